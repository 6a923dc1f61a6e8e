//! Memory that begins on a cache line: a vector of AVX-512 that lies across two lines takes two accesses, and `Vec` starts anywhere. Measured on
//! the kernels of this folder that makes 10 to 40 % of their time.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// Numbers: any bytes are one, zero bytes are zero, and none needs more than a line's alignment.
///
/// # Safety
/// Implementors must be just that.
pub unsafe trait Number: Copy {}
// SAFETY: numbers of the machine.
unsafe impl Number for u8 {}
// SAFETY: as above.
unsafe impl Number for i8 {}
// SAFETY: as above.
unsafe impl Number for i16 {}
// SAFETY: as above.
unsafe impl Number for f32 {}

/// Values that begin on a cache line; a slice in every other way. Its length changes by [`Aligned::grow`] only.
#[derive(Clone)]
pub struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Number> Aligned<T> {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0; LINE_BYTES]); (len * size_of::<T>()).div_ceil(LINE_BYTES)], len, values: PhantomData }
    }

    /// Add zeros up to `len` values, if there are fewer.
    pub fn grow(&mut self, len: usize) {
        if len > self.len {
            let mut longer = Self::zeroed(len);
            longer[..self.len].copy_from_slice(self);
            *self = longer;
        }
    }
}

impl<T: Number> From<&[T]> for Aligned<T> {
    fn from(values: &[T]) -> Self {
        let mut own = Self::zeroed(values.len());
        own.copy_from_slice(values);
        own
    }
}

impl<T> Default for Aligned<T> {
    /// Empty, without allocating.
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, values: PhantomData }
    }
}

impl<T: Number> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `lines` holds at least `len` numbers, all bytes initialised, aligned for any (both by the trait's contract).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Number> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed for writing; whatever number is written, the bytes stay initialised.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Number + std::fmt::Debug> std::fmt::Debug for Aligned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_begin_on_a_line_and_survive_growing() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut values = Aligned::<f32>::zeroed(len);
            assert_eq!(values.len(), len);
            assert!(values.iter().all(|&x| x == 0.0));
            values.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            values.grow(len + 33);
            assert_eq!(values.as_ptr() as usize % LINE_BYTES, 0);
            let wanted: Vec<f32> = (0..len).map(|i| i as f32).chain([0.0; 33]).collect();
            assert_eq!(&values[..], wanted);
            values.grow(3);
            assert_eq!(values.clone().len(), len + 33);
        }
        assert_eq!(&Aligned::from(&[1i16, 2, 3][..])[..], [1, 2, 3]);
        assert!(Aligned::<u8>::default().is_empty());
    }
}
