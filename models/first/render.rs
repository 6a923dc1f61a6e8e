//! Renders parts of the simulated line to stdout, for the Python scripts beside it: `render SEED DEFECT_SHARE FIRST COUNT`.
//!
//! Built by `simulate.py` with rustc alone from the renderer's own sources, so that it takes seconds and not the whole program.
//! Per part: 128 bytes of text `product|defect|size_px|contrast|delta_levels`, the mask (640x480 bytes), the picture (640x480x3).
#![allow(dead_code)]
#[path = "../../src/source/simulated/blister.rs"]
mod blister;
#[path = "../../src/source/simulated/board.rs"]
mod board;
#[path = "../../src/source/simulated/canvas.rs"]
mod canvas;
#[path = "../../src/source/simulated/cap.rs"]
mod cap;
#[path = "../../src/source/simulated/defect.rs"]
mod defect;
#[path = "../../src/source/simulated/fabric.rs"]
mod fabric;
#[path = "../../src/source/simulated/font.rs"]
mod font;
#[path = "../../src/source/simulated/label.rs"]
mod label;
#[path = "../../src/source/simulated/line.rs"]
mod line;
#[path = "../../src/source/simulated/math.rs"]
mod math;
#[path = "../../src/source/simulated/metal.rs"]
mod metal;
#[path = "../../src/source/simulated/optics.rs"]
mod optics;
#[path = "../../src/source/simulated/product.rs"]
mod product;

pub use defect::{DefectKind, DefectRange};
pub use line::WIDTH_PX;
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [seed, share, first, count] = args.as_slice() else { return Err("usage: render SEED DEFECT_SHARE FIRST COUNT".into()) };
    let (first, count): (u32, u32) = (first.parse()?, count.parse()?);
    let mut line = line::SimulatedLine::new(seed.parse()?, share.parse()?);
    let mut out = std::io::BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    let mut pixels = Vec::new();
    for part in first..first + count {
        let truth = line.render(part, &mut pixels);
        let mut text = format!("{}|", truth.product);
        if let Some(d) = &truth.defect {
            text += &format!("{}|{}|{}|{}", d.name, d.size_px, d.contrast, d.delta_levels);
        }
        write!(out, "{text:128}")?;
        out.write_all(truth.mask)?;
        out.write_all(&pixels)?;
    }
    Ok(())
}
