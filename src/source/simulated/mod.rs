//! The simulated line: rendered parts of several products, some with a defect whose mask is known exactly.
//!
//! A part is a function of (seed, part number) alone: neither the order of calls nor the machine changes a byte of it (see `math`).
//! The design of the products is the same for every seed, so a model trained on one seed is tested on another.
//! A part is *assembled* on a texture by its product, perhaps *damaged* by a brush, and *photographed* by the optics: pose, light,
//! lens, motion blur and sensor noise. Good and defective parts take exactly the same way, so nothing but the defect tells them apart.
//! The mask is measured: the noiseless picture with the defect against the noiseless picture without it.
//!
//! This module knows nothing of models, verdicts or files.

mod blister;
mod board;
mod canvas;
mod cap;
mod defect;
mod fabric;
mod font;
mod label;
mod line;
mod math;
mod metal;
mod optics;
mod product;

pub use defect::{DefectKind, DefectRange};
pub use line::{DefectTruth, HEIGHT_PX, PartTruth, SimulatedLine, WIDTH_PX};

use super::{Grab, Source, SourceError, Trigger};
use crate::frame::{Frame, Origin, PartId, PixelFormat, Truth, now_ns};
use crate::pool::{Pool, Pooled};
use std::time::Duration;

impl SimulatedLine {
    /// Part `number` as a frame in `pixels` (whatever was in them is gone), with what is true of it.
    pub fn frame(&mut self, number: u32, mut pixels: Pooled<Vec<u8>>) -> Frame {
        let truth = self.render(number, &mut pixels);
        let origin = Origin { path: None, product: Some(truth.product), truth: Some(Truth { defect: truth.defect.map(|d| d.name) }) };
        Frame {
            pixels,
            format: PixelFormat::Rgb8,
            width_px: WIDTH_PX,
            height_px: HEIGHT_PX,
            captured_ns: now_ns(),
            seq: number.into(),
            part: None,
            origin,
        }
    }
}

impl Source for SimulatedLine {
    fn describe(&self) -> String {
        format!("simulated line, seed {}, {:.0} % defective, {WIDTH_PX}x{HEIGHT_PX} RGB", self.seed(), self.defect_share() * 100.0)
    }

    fn open(&mut self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Renders the trigger's part, or the next of its own counting. Never ends and never fails.
    fn grab(&mut self, trigger: Option<&Trigger>, timeout: Duration, pool: &Pool<Vec<u8>>) -> Result<Grab, SourceError> {
        let Some(pixels) = pool.take_timeout(timeout) else { return Ok(Grab::Timeout) };
        let seq = self.count_frame();
        let part = trigger.map(|t| t.part);
        // A free-running line numbers its parts by its own frames; the number wraps as the board's does.
        let number = part.map_or(seq as u32, |PartId(number)| number);
        Ok(Grab::Frame(Frame { seq, part, ..self.frame(number, pixels) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(line: &mut SimulatedLine, trigger: Option<&Trigger>, pool: &Pool<Vec<u8>>) -> Frame {
        match line.grab(trigger, Duration::from_secs(10), pool) {
            Ok(Grab::Frame(frame)) => frame,
            _ => panic!("the simulated line always has a frame"),
        }
    }

    #[test]
    fn a_trigger_gets_its_own_part_and_a_free_line_counts() {
        let mut line = SimulatedLine::new(6, 0.5);
        let pool = Pool::new(1, Vec::new);
        let mut pixels = Vec::new();
        let trigger = Trigger { part: PartId(4_000_000_000), received_ns: 0, deadline_ns: 0, encoder_ticks: 0 };
        let triggered = frame(&mut line, Some(&trigger), &pool);
        assert_eq!((triggered.part, triggered.seq, triggered.format), (Some(trigger.part), 0, PixelFormat::Rgb8));
        let mut other = SimulatedLine::new(6, 0.5);
        let truth = other.render(trigger.part.0, &mut pixels);
        assert_eq!(triggered.origin.product.as_ref(), Some(&truth.product));
        assert_eq!(triggered.origin.truth, Some(Truth { defect: truth.defect.map(|d| d.name) }));
        assert!(triggered.pixels.as_slice() == pixels);

        // The only buffer is on loan: no frame, and none lost.
        assert!(matches!(line.grab(None, Duration::from_millis(1), &pool), Ok(Grab::Timeout)));
        drop(triggered);
        let free = frame(&mut line, None, &pool);
        assert_eq!((free.part, free.seq), (None, 1));
        other.render(1, &mut pixels);
        assert!(free.pixels.as_slice() == pixels);
    }
}
