//! The simulated line by itself: how fast it renders, and what it looks like.
//!
//! `cargo run --release --example simulated_line` prints pictures per second of this one thread;
//! with a file name it also writes a contact sheet: of every product a good part and a defective one, the mask's outline in magenta.

use cull::source::simulated::{HEIGHT_PX, SimulatedLine, WIDTH_PX};
use image::imageops::{FilterType, replace, resize};
use image::{Rgb, RgbImage};
use std::time::{Duration, Instant};

const PARTS: u32 = 600;
/// Size of a picture on the contact sheet, and pictures in a row.
const CELL: [u32; 2] = [480, 360];
const COLUMNS: u32 = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let started = Instant::now();
    let mut line = SimulatedLine::new(1, 0.2);
    println!("textures made in {:.2} s", started.elapsed().as_secs_f32());
    let mut pixels = Vec::new();
    line.render(0, &mut pixels);

    let mut fastest = [Duration::MAX; 2];
    let started = Instant::now();
    for part in 0..PARTS {
        let begun = Instant::now();
        let bad = line.render(part, &mut pixels).defect.is_some();
        if let Some(best) = fastest.get_mut(usize::from(bad)) {
            *best = (*best).min(begun.elapsed());
        }
    }
    let seconds = started.elapsed().as_secs_f32();
    println!("{:.0} pictures/s over {PARTS} parts, a fifth of them defective, one thread", PARTS as f32 / seconds);
    println!("fastest good part {:.2} ms, fastest defective part {:.2} ms", ms(fastest[0]), ms(fastest[1]));

    let Some(file) = std::env::args().nth(1) else { return Ok(()) };
    let names: Vec<_> = line.products().cloned().collect();
    let mut line = SimulatedLine::new(2, 0.5);
    let rows = (2 * names.len() as u32).div_ceil(COLUMNS);
    let mut sheet = RgbImage::new(COLUMNS * CELL[0], rows * CELL[1]);
    for (i, name) in names.iter().enumerate() {
        for bad in [false, true] {
            let mut part = 0;
            let mask = loop {
                let truth = line.render(part, &mut pixels);
                let large = truth.defect.as_ref().is_none_or(|defect| defect.size_px > 20.0 && defect.contrast > 0.5);
                if truth.product == *name && truth.defect.is_some() == bad && large {
                    break truth.mask.to_vec();
                }
                part += 1;
            };
            let mut picture = RgbImage::from_raw(WIDTH_PX, HEIGHT_PX, pixels.clone()).ok_or("picture size")?;
            outline(&mut picture, &mask);
            let at = 2 * i as u32 + u32::from(bad);
            let small = resize(&picture, CELL[0], CELL[1], FilterType::Triangle);
            replace(&mut sheet, &small, i64::from(at % COLUMNS * CELL[0]), i64::from(at / COLUMNS * CELL[1]));
        }
    }
    sheet.save(&file)?;
    println!("contact sheet in {file}");
    Ok(())
}

/// Draw around the mask, a few pixels away from it.
fn outline(picture: &mut RgbImage, mask: &[u8]) {
    const REACH: i64 = 5;
    let marked = |x: i64, y: i64| {
        let inside = (0..i64::from(WIDTH_PX)).contains(&x) && (0..i64::from(HEIGHT_PX)).contains(&y);
        inside && mask.get((y * i64::from(WIDTH_PX) + x) as usize).is_some_and(|&m| m != 0)
    };
    for (x, y, px) in picture.enumerate_pixels_mut() {
        let (x, y) = (i64::from(x), i64::from(y));
        let near = |reach: i64| (-reach..=reach).any(|dy| (-reach..=reach).any(|dx| marked(x + dx, y + dy)));
        if near(REACH) && !near(REACH - 2) {
            *px = Rgb([255, 0, 255]);
        }
    }
}

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e3
}
