//! Where a kernel that reads a picture row by row has it from: memory, or another kernel that makes each row when it is wanted, so that what lies
//! between the two never leaves the cache.

/// Rows of a channels-last picture.
pub enum Source<'a> {
    /// All of them, `[height, width, channels]`.
    Picture(&'a [f32]),
    /// Made when wanted.
    Made {
        /// Writes row `y`, all of its values.
        make: &'a mut dyn FnMut(usize, &mut [f32]),
        /// Room for one row.
        room: &'a mut [f32],
    },
}

impl Source<'_> {
    /// Whether it can give rows of `len` values, `rows` of them.
    pub fn fits(&self, rows: usize, len: usize) -> bool {
        match self {
            Self::Picture(picture) => picture.len() == rows * len,
            Self::Made { room, .. } => room.len() >= len,
        }
    }

    /// Row `y`, of `len` values.
    ///
    /// # Panics
    /// When it does not fit ([`Source::fits`]).
    pub fn row(&mut self, y: usize, len: usize) -> &[f32] {
        match self {
            Self::Picture(picture) => &picture[y * len..][..len],
            Self::Made { make, room } => {
                make(y, &mut room[..len]);
                &room[..len]
            }
        }
    }

    /// Row `y` to `to`, which is as long.
    ///
    /// # Panics
    /// As [`Source::row`].
    pub fn copy_row(&mut self, y: usize, to: &mut [f32]) {
        match self {
            Self::Picture(picture) => to.copy_from_slice(&picture[y * to.len()..][..to.len()]),
            Self::Made { make, .. } => make(y, to),
        }
    }
}
