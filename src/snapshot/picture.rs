//! [`Frame`] -> an RGB picture for people to look at, decoded exactly as the model's input is.

use crate::frame::Frame;
use crate::preprocess::{self, PreprocessError};
use image::RgbImage;

/// Convert a frame of any [`crate::frame::PixelFormat`] to RGB, at the frame's own size.
///
/// # Errors
/// When bytes are missing or the JPEG is damaged.
pub fn rgb_from_frame(frame: &Frame) -> Result<RgbImage, PreprocessError> {
    let mut pixels = Vec::new();
    preprocess::decode_rgb(frame, &mut pixels)?;
    let (expected, actual) = (frame.width_px as usize * frame.height_px as usize * 3, pixels.len());
    RgbImage::from_raw(frame.width_px, frame.height_px, pixels).ok_or(PreprocessError::OutputLength { expected, actual })
}
