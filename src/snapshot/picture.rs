//! [`Frame`] -> 8-bit RGB for people to look at. The model never sees this: it has [`crate::preprocess`], with its own resizing and maths.

use crate::frame::{Frame, PixelFormat};
use image::RgbImage;

/// Larger pictures than this are refused before anything is allocated: no industrial camera is bigger, a damaged JPEG header may be.
const MAX_SIDE_PX: u32 = 16_384;

/// Why a frame is no picture.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// The frame holds fewer bytes than its size and format need.
    #[error("the frame has {got} bytes where {width_px}x{height_px} {format:?} needs {need}; check the camera's cable and format")]
    Short {
        /// Bytes present.
        got: usize,
        /// Bytes needed.
        need: usize,
        /// Width of the frame.
        width_px: u32,
        /// Height of the frame.
        height_px: u32,
        /// Format of the frame.
        format: PixelFormat,
    },
    /// The JPEG cannot be decoded.
    #[error("the JPEG picture cannot be decoded ({0}); check the camera's cable")]
    Jpeg(String),
}

/// Convert a frame of any [`PixelFormat`] to RGB, at the frame's own size.
///
/// # Errors
/// [`PictureError`] when bytes are missing or the JPEG is damaged.
pub fn rgb_from_frame(frame: &Frame) -> Result<RgbImage, PictureError> {
    rgb_from_bytes(&frame.pixels, frame.format, frame.width_px, frame.height_px)
}

/// [`rgb_from_frame`] on bare bytes: `bytes` is row-major without padding, as [`PixelFormat`] says.
///
/// # Errors
/// [`PictureError`] when bytes are missing or the JPEG is damaged.
pub fn rgb_from_bytes(bytes: &[u8], format: PixelFormat, width_px: u32, height_px: u32) -> Result<RgbImage, PictureError> {
    let pixels = width_px as usize * height_px as usize;
    let need = match format {
        PixelFormat::Rgb8 => pixels * 3,
        PixelFormat::Gray8 => pixels,
        PixelFormat::Yuyv => pixels * 2,
        PixelFormat::Mjpg => return rgb_from_jpeg(bytes),
    };
    let short = || PictureError::Short { got: bytes.len(), need, width_px, height_px, format };
    let bytes = bytes.get(..need).ok_or_else(short)?;
    let rgb = match format {
        PixelFormat::Rgb8 => bytes.to_vec(),
        PixelFormat::Gray8 => bytes.iter().flat_map(|&grey| [grey; 3]).collect(),
        PixelFormat::Yuyv | PixelFormat::Mjpg => rgb_from_yuyv(bytes),
    };
    RgbImage::from_raw(width_px, height_px, rgb).ok_or_else(short)
}

fn rgb_from_jpeg(bytes: &[u8]) -> Result<RgbImage, PictureError> {
    let mut reader = image::ImageReader::with_format(std::io::Cursor::new(bytes), image::ImageFormat::Jpeg);
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE_PX);
    limits.max_image_height = Some(MAX_SIDE_PX);
    reader.limits(limits);
    Ok(reader.decode().map_err(|error| PictureError::Jpeg(error.to_string()))?.into_rgb8())
}

/// BT.601, limited range, in 16.16 fixed point: what V4L2 cameras mean by YUYV.
fn rgb_from_yuyv(bytes: &[u8]) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(bytes.len() / 2 * 3);
    for quad in bytes.chunks_exact(4) {
        let &[y0, u, y1, v] = quad else { continue };
        let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
        for y in [y0, y1] {
            let luma = (i32::from(y) - 16) * 76_309;
            let clamp = |value: i32| ((value + 32_768) >> 16).clamp(0, 255) as u8;
            rgb.push(clamp(luma + 104_597 * v));
            rgb.push(clamp(luma - 25_675 * u - 53_279 * v));
            rgb.push(clamp(luma + 132_201 * u));
        }
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yuyv_primaries_come_out_as_they_went_in() {
        // BT.601 limited-range code points of white, black, red, green and blue.
        for (yuv, want) in [
            ([235u8, 128, 128], [255u8, 255, 255]),
            ([16, 128, 128], [0, 0, 0]),
            ([81, 90, 240], [255, 0, 0]),
            ([145, 54, 34], [0, 255, 0]),
            ([41, 240, 110], [0, 0, 255]),
        ] {
            let [y, u, v] = yuv;
            let picture = rgb_from_bytes(&[y, u, y, v], PixelFormat::Yuyv, 2, 1).expect("two pixels");
            for pixel in picture.pixels() {
                for (got, want) in pixel.0.iter().zip(want) {
                    assert!(got.abs_diff(want) <= 2, "{yuv:?} became {:?}, not {want:?}", pixel.0);
                }
            }
        }
    }

    #[test]
    fn short_and_damaged_frames_are_errors() {
        for format in [PixelFormat::Rgb8, PixelFormat::Gray8, PixelFormat::Yuyv] {
            assert!(matches!(rgb_from_bytes(&[0; 3], format, 2, 2), Err(PictureError::Short { .. })), "{format:?}");
        }
        assert!(matches!(rgb_from_bytes(&[0xff, 0xd8, 0xff, 0xd9], PixelFormat::Mjpg, 2, 2), Err(PictureError::Jpeg(_))));
    }
}
