//! Pictures of good parts to train on, in the model's own size: rendered ones without end, or a folder's. All come through the inspector's preprocessing.

use super::pseudo::Picture;
use crate::distill::student::RGB;
use crate::distill::synth::normal;
use cull::pool::Pooled;
use cull::preprocess::{PreprocessSpec, Preprocessor};
use cull::source::simulated::SimulatedLine;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use std::path::{Path, PathBuf};

/// Most pictures of a folder that are kept in memory; of more, evenly spread ones are taken.
const MOST_PICTURES: usize = 4000;
/// Pictures of a folder are moved by up to this many pixels, since a few hundred parts do not show every pose.
const SHIFT_PX: f32 = 3.0;
/// Their brightness is changed by this share (one standard deviation).
const GAIN: f32 = 0.04;
/// Noise added to them, in grey levels, at most: their own would be learned by heart.
const NOISE: f32 = 1.5;

/// Parts of the simulated line between the first ones of two runs whose seeds are neighbours (odd: all seeds differ).
const SEED_APART: u32 = 0x9e37_79b9;

/// Where good parts come from.
pub enum Parts {
    /// The simulated line of this seed.
    Simulated(u64),
    /// Pictures of a folder, `[height, width, 3]` each.
    Folder(Vec<Vec<u8>>),
}

/// Reads parts for one thread.
pub struct Reader<'a> {
    parts: &'a Parts,
    line: Option<SimulatedLine>,
    preprocessor: Preprocessor,
    size: [usize; 2],
    frame: Vec<u8>,
    planar: Vec<f32>,
}

/// The preprocessing of `spec` that leaves pixels in grey levels.
fn grey_levels(size: [usize; 2]) -> PreprocessSpec {
    PreprocessSpec { width_px: size[1] as u32, height_px: size[0] as u32, mean: [0.0; RGB], std: [1.0; RGB] }
}

impl Parts {
    /// Read the pictures `files` at `size` (height, width). Returns what could not be read, and why.
    pub fn folder(files: &[PathBuf], size: [usize; 2], on_picture: &mut dyn FnMut()) -> (Self, Vec<(PathBuf, String)>) {
        let every = files.len().div_ceil(MOST_PICTURES).max(1);
        let spec = grey_levels(size);
        let mut preprocessor = Preprocessor::new(&spec, None);
        let mut planar = vec![0.0; spec.input_len()];
        let (mut pictures, mut skipped) = (Vec::new(), Vec::new());
        for path in files.iter().step_by(every) {
            on_picture();
            match read(path, &mut preprocessor, &mut planar) {
                Ok(()) => pictures.push(interleaved(&planar).map(|v| v.round() as u8).collect()),
                Err(why) => skipped.push((path.clone(), why)),
            }
        }
        (Self::Folder(pictures), skipped)
    }

    /// Pictures of the folder; `None` for a line that never ends.
    pub fn count(&self) -> Option<usize> {
        match self {
            Self::Simulated(_) => None,
            Self::Folder(pictures) => Some(pictures.len()),
        }
    }

    /// A reader for pictures of `size` (height, width).
    pub fn reader(&self, size: [usize; 2]) -> Reader<'_> {
        let spec = grey_levels(size);
        Reader {
            line: match self {
                Self::Simulated(seed) => Some(SimulatedLine::new(*seed, 0.0)),
                Self::Folder(_) => None,
            },
            parts: self,
            planar: vec![0.0; spec.input_len()],
            preprocessor: Preprocessor::new(&spec, None),
            size,
            frame: Vec::new(),
        }
    }
}

impl Reader<'_> {
    /// Good part number `number`, a function of it and `seed`.
    pub fn part(&mut self, number: u64, seed: u64) -> Picture {
        let [height, width] = self.size;
        match (&mut self.line, self.parts) {
            (Some(line), _) => {
                // Another run's seed, other parts.
                let number = (number as u32).wrapping_add((seed as u32).wrapping_mul(SEED_APART));
                let frame = line.frame(number, Pooled::detached(std::mem::take(&mut self.frame)));
                // A rendered frame has the size it says.
                let fits = self.preprocessor.run(&frame, &mut self.planar);
                debug_assert!(fits.is_ok());
                self.frame = frame.pixels.to_vec();
                Picture { height, width, pixels: interleaved(&self.planar).collect() }
            }
            (None, Parts::Folder(pictures)) => {
                let mut rng = Pcg64::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let pixels = pictures.get(rng.random_range(0..pictures.len().max(1))).map(Vec::as_slice).unwrap_or_default();
                varied(pixels, self.size, &mut rng)
            }
            (None, Parts::Simulated(_)) => unreachable!("`reader` gave the simulated line"),
        }
    }
}

/// A picture as another part of its kind might have been taken: moved a little, lit a little differently, with other noise.
fn varied(pixels: &[u8], [height, width]: [usize; 2], rng: &mut Pcg64) -> Picture {
    let mut one = |spread: f32| rng.random_range(-spread..spread);
    let (dx, dy) = (one(SHIFT_PX).round() as i64, one(SHIFT_PX).round() as i64);
    let gain = 1.0 + GAIN * normal(rng);
    let noise = rng.random_range(0.0..NOISE);
    let mut out = Vec::with_capacity(height * width * RGB);
    for y in 0..height as i64 {
        for x in 0..width as i64 {
            let (sx, sy) = ((x + dx).clamp(0, width as i64 - 1) as usize, (y + dy).clamp(0, height as i64 - 1) as usize);
            let at = (sy * width + sx) * RGB;
            for c in 0..RGB {
                let v = pixels.get(at + c).copied().map_or(0.0, f32::from);
                out.push((v * gain + noise * normal(rng)).clamp(0.0, 255.0));
            }
        }
    }
    Picture { height, width, pixels: out }
}

/// Read a picture into `planar`.
pub(super) fn read(path: &Path, preprocessor: &mut Preprocessor, planar: &mut [f32]) -> Result<(), String> {
    let frame = cull::dataset::load_frame(path).map_err(|e| e.to_string())?;
    preprocessor.run(&frame, planar).map_err(|e| e.to_string())
}

/// `[3, pixels]` -> `[pixels, 3]`.
pub(super) fn interleaved(planar: &[f32]) -> impl Iterator<Item = f32> + '_ {
    let pixels = planar.len() / RGB;
    (0..planar.len()).map(move |i| planar.get(i % RGB * pixels + i / RGB).copied().unwrap_or(0.0))
}
