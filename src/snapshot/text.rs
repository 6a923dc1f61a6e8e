//! Caption text on pictures: fixed-width bitmap glyphs, integer scaling, nothing to install.

use image::{Rgb, RgbImage};

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

    /// The rows of a printable ASCII character, top first, leftmost pixel in the highest bit; a question mark for any other character.
    ///
    /// Read here and not by `spleen-font`'s own reader, which takes the 8x16 file (PSF version 1, 4-byte header) for version 2 (32 bytes).
    fn rows(self, character: char) -> &'static [u8] {
        let (file, header) = match self {
            Face::Small => (spleen_font::FONT_6X12, 32),
            Face::Normal => (spleen_font::FONT_8X16, 4),
        };
        let code = if matches!(character, ' '..='~') { character as usize } else { '?' as usize };
        // Up to 8 pixels wide: one byte a row.
        let size = self.height_px() as usize;
        let start = header + code * size;
        file.get(start..start + size).unwrap_or_default()
    }
}

/// Draw `text` with its top left corner at `(x, y)`, each font pixel `scale` pixels wide. What leaves the picture is cut off.
pub(crate) fn draw(picture: &mut RgbImage, face: Face, scale: u32, (x, y): (u32, u32), text: &str, colour: Rgb<u8>) {
    for (column, character) in (0u32..).zip(text.chars()) {
        let left = x + column * face.width_px() * scale;
        for (glyph_y, &row) in (0u32..).zip(face.rows(character)) {
            for glyph_x in 0..face.width_px() {
                if row & (0x80 >> glyph_x) != 0 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Rows and columns of a character's pixels.
    fn extent(face: Face, character: char) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let mut picture = RgbImage::new(face.width_px(), face.height_px());
        draw(&mut picture, face, 1, (0, 0), &character.to_string(), Rgb([255; 3]));
        let lit = picture.enumerate_pixels().filter(|(_, _, pixel)| pixel.0 != [0; 3]);
        lit.map(|(x, y, _)| (y, x)).unzip()
    }

    #[test]
    fn characters_look_like_themselves() {
        for face in [Face::Small, Face::Normal] {
            let (rows, columns) = extent(face, '|');
            assert!(columns.len() <= 2 && rows.len() >= face.height_px() as usize / 2, "{face:?} |: {rows:?} {columns:?}");
            let (rows, columns) = extent(face, '-');
            assert!(rows.len() <= 2 && columns.len() >= face.width_px() as usize / 2, "{face:?} -: {rows:?} {columns:?}");
            assert!(extent(face, ' ').0.is_empty());
            assert_eq!(extent(face, 'ä'), extent(face, '?'));
            for character in '!'..='~' {
                assert!(!extent(face, character).0.is_empty(), "{face:?} {character}");
            }
        }
    }
}
