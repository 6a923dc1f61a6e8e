//! Caption text on pictures: fixed-width bitmap glyphs, integer scaling, nothing to install.

use image::{Rgb, RgbImage};
use spleen_font::PSF2Font;

/// Which face a caption is drawn in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Face {
    /// 6x12 pixels: pictures below about 400 px.
    Small,
    /// 8x16 pixels.
    Normal,
}

impl Face {
    /// Width of one character, in pixels, before scaling.
    pub(crate) fn width_px(self) -> u32 {
        match self {
            Face::Small => 6,
            Face::Normal => 8,
        }
    }

    /// Height of one character, in pixels, before scaling.
    pub(crate) fn height_px(self) -> u32 {
        match self {
            Face::Small => 12,
            Face::Normal => 16,
        }
    }

    fn bytes(self) -> &'static [u8] {
        match self {
            Face::Small => spleen_font::FONT_6X12,
            Face::Normal => spleen_font::FONT_8X16,
        }
    }
}

/// Draw `text` with its top left corner at `(x, y)`, each font pixel `scale` pixels wide. What leaves the picture is cut off; characters the
/// font lacks are left blank.
pub(crate) fn draw(picture: &mut RgbImage, face: Face, scale: u32, (x, y): (u32, u32), text: &str, colour: Rgb<u8>) {
    let Ok(mut font) = PSF2Font::new(face.bytes()) else { return };
    let mut utf8 = [0u8; 4];
    for (column, character) in (0u32..).zip(text.chars()) {
        let Some(glyph) = font.glyph_for_utf8(character.encode_utf8(&mut utf8).as_bytes()) else { continue };
        let left = x + column * face.width_px() * scale;
        for (glyph_y, row) in (0u32..).zip(glyph) {
            for (glyph_x, on) in (0u32..).zip(row).take(face.width_px() as usize) {
                if on {
                    fill(picture, left + glyph_x * scale, y + glyph_y * scale, scale, scale, colour);
                }
            }
        }
    }
}

/// Fill a rectangle, cut off at the picture's edge.
pub(crate) fn fill(picture: &mut RgbImage, x: u32, y: u32, width_px: u32, height_px: u32, colour: Rgb<u8>) {
    for row in y..(y.saturating_add(height_px)).min(picture.height()) {
        for column in x..(x.saturating_add(width_px)).min(picture.width()) {
            picture.put_pixel(column, row, colour);
        }
    }
}
