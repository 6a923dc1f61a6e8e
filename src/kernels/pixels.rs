//! Rows of pixels: colour conversion, chroma upsampling, interleaved to planar and back. Integer arithmetic, so every instruction set gives the
//! same bytes.
//!
//! Each function is written once in plain Rust, in a form that the compiler turns into vector code, and compiled for every instruction set; the
//! generic compilation is the oracle. (On aarch64 NEON is part of the base set, so the generic one is the NEON one.)

use super::isa::{Isa, per_isa};

per_isa! {
    /// YUYV (4:2:2 packed, BT.601, limited range) to planar red, green, blue. `source` has 4 bytes for two pixels (Y0 U Y1 V); each plane has
    /// the row's width, which is even. What is longer than the shortest of them is left alone.
    pub fn yuyv_to_planar(source: &[u8], red: &mut [u8], green: &mut [u8], blue: &mut [u8]) => yuyv_to_planar_generic
}

per_isa! {
    /// Full-range Y, Cb, Cr (JFIF) to planar red, green, blue, rounded as libjpeg rounds. All rows have the same length; what is longer than
    /// the shortest is left alone.
    pub fn ycc_to_planar(luma: &[u8], cb: &[u8], cr: &[u8], red: &mut [u8], green: &mut [u8], blue: &mut [u8]) => ycc_to_planar_generic
}

per_isa! {
    /// Chroma row of `n` samples to `2 n` (libjpeg's "fancy" h2v1 upsampling: 3/4 of the nearer sample, 1/4 of the further, rounded down and up in
    /// turn). `out` has at least `2 n` bytes.
    pub fn upsample_h2v1(source: &[u8], out: &mut [u8]) => upsample_h2v1_generic
}

per_isa! {
    /// Two chroma rows of `n` samples to one row of `2 n` (libjpeg's "fancy" h2v2 upsampling): `near` is the chroma row that covers the output row,
    /// `far` the next one on the other side. `out` has at least `2 n` bytes.
    pub fn upsample_h2v2(near: &[u8], far: &[u8], out: &mut [u8]) => upsample_h2v2_generic
}

per_isa! {
    /// Planar red, green, blue to interleaved RGB, 3 bytes a pixel. What is longer than the shortest is left alone.
    pub fn planar_to_rgb(red: &[u8], green: &[u8], blue: &[u8], out: &mut [u8]) => planar_to_rgb_generic
}

per_isa! {
    /// Interleaved triples to three planes. What is longer than the shortest is left alone.
    pub fn split_triples(source: &[i16], first: &mut [i16], second: &mut [i16], third: &mut [i16]) => split_triples_generic
}

#[inline(always)]
fn yuyv_to_planar_generic(source: &[u8], red: &mut [u8], green: &mut [u8], blue: &mut [u8]) {
    // BT.601 in 1/256: 298 = 255/219, 409 = 1.402 * 255/224, and so on: red = (298 a + 409 v + 128) >> 8 with a = y - 16. Whole multiples of 256 are
    // taken out of the sums, so that what remains fits 16 bits and the result stays exact.
    let planes = red.as_chunks_mut().0.iter_mut().zip(green.as_chunks_mut().0).zip(blue.as_chunks_mut().0);
    for (pair, ((red, green), blue)) in source.as_chunks::<4>().0.iter().zip(planes) {
        let (u, v) = (i16::from(pair[1]) - 128, i16::from(pair[3]) - 128);
        let (for_red, for_green, for_blue) = (153 * v + 128, 48 * v - 100 * u + 128, 4 * u + 128);
        let [a, b] = [pair[0], pair[2]].map(|y| i16::from(y) - 16);
        let pixels = |more: i16, rounded: i16| {
            let [a, b] = [a, b].map(|a| (a + more + ((42 * a + rounded) >> 8)).clamp(0, 255) as u16);
            two_bytes(a, b)
        };
        *red = pixels(v, for_red);
        *green = pixels(-v, for_green);
        *blue = pixels(2 * u, for_blue);
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // Six rows in step, which the compiler vectorises in this form.
fn ycc_to_planar_generic(luma: &[u8], cb: &[u8], cr: &[u8], red: &mut [u8], green: &mut [u8], blue: &mut [u8]) {
    let n = luma.len().min(cb.len()).min(cr.len()).min(red.len()).min(green.len()).min(blue.len());
    let (luma, cb, cr) = (&luma[..n], &cb[..n], &cr[..n]);
    let (red, green, blue) = (&mut red[..n], &mut green[..n], &mut blue[..n]);
    // jdcolor.c: 1.40200, -0.34414, -0.71414, 1.77200 in 1/65536, rounded to nearest, half up. The whole multiples of 65536 are taken out of the
    // products. (2 x k >> 16) + 1 >> 1 is (x k + 32768) >> 16, and a multiplication that keeps the high half is one instruction.
    let high = |x: i16, k: i16| ((i32::from(2 * x) * i32::from(k)) >> 16) as i16;
    for i in 0..n {
        let y = i16::from(luma[i]);
        let (u, v) = (i16::from(cb[i]) - 128, i16::from(cr[i]) - 128);
        let more_red = v + ((high(v, 26_345) + 1) >> 1);
        let more_blue = 2 * u + ((high(u, -14_942) + 1) >> 1);
        let less_green = ((i32::from(u) * -22_554 + i32::from(v) * 18_734 + 32_768) >> 16) as i16 - v;
        red[i] = (y + more_red).clamp(0, 255) as u8;
        green[i] = (y + less_green).clamp(0, 255) as u8;
        blue[i] = (y + more_blue).clamp(0, 255) as u8;
    }
}

/// Two values below 256 as bytes, in this order. One 16-bit store for the compiler, which makes poor code of two interleaved ones.
#[inline(always)]
fn two_bytes(first: u16, second: u16) -> [u8; 2] {
    (first | second << 8).to_le_bytes()
}

#[inline(always)]
fn upsample_h2v1_generic(source: &[u8], out: &mut [u8]) {
    let n = source.len();
    let Some(out) = out.get_mut(..2 * n) else { panic!("{} bytes for {n} samples doubled", out.len()) };
    match source {
        [] => {}
        // jdsample.c takes plain doubling for such narrow pictures.
        [a] => out.fill(*a),
        [a, b] => out.copy_from_slice(&[*a, *a, *b, *b]),
        [first, .., last] => {
            out[0] = *first;
            out[2 * n - 1] = *last;
            let inner = &mut out[1..2 * n - 1];
            // Between samples i and i + 1: the right half of i, the left half of i + 1.
            for ((pair, &a), &b) in inner.as_chunks_mut::<2>().0.iter_mut().zip(source).zip(&source[1..]) {
                let (a, b) = (u16::from(a), u16::from(b));
                *pair = two_bytes((3 * a + b + 2) >> 2, (a + 3 * b + 1) >> 2);
            }
        }
    }
}

#[inline(always)]
fn upsample_h2v2_generic(near: &[u8], far: &[u8], out: &mut [u8]) {
    let n = near.len().min(far.len());
    let (near, far) = (&near[..n], &far[..n]);
    let Some(out) = out.get_mut(..2 * n) else { panic!("{} bytes for {n} samples doubled", out.len()) };
    match near {
        [] => {}
        [a] => out.fill(*a),
        [a, b] => out.copy_from_slice(&[*a, *a, *b, *b]),
        _ => {
            let column = |i: usize| 3 * u16::from(near[i]) + u16::from(far[i]);
            out[0] = ((4 * column(0) + 8) >> 4) as u8;
            out[2 * n - 1] = ((4 * column(n - 1) + 7) >> 4) as u8;
            let inner = &mut out[1..2 * n - 1];
            let next = near[1..].iter().zip(&far[1..]);
            for ((pair, (&near, &far)), (&next_near, &next_far)) in
                inner.as_chunks_mut::<2>().0.iter_mut().zip(near.iter().zip(far)).zip(next)
            {
                let (a, b) = (3 * u16::from(near) + u16::from(far), 3 * u16::from(next_near) + u16::from(next_far));
                *pair = two_bytes((3 * a + b + 7) >> 4, (a + 3 * b + 8) >> 4);
            }
        }
    }
}

#[inline(always)]
fn planar_to_rgb_generic(red: &[u8], green: &[u8], blue: &[u8], out: &mut [u8]) {
    for (((rgb, &r), &g), &b) in out.chunks_exact_mut(3).zip(red).zip(green).zip(blue) {
        rgb[0] = r;
        rgb[1] = g;
        rgb[2] = b;
    }
}

#[inline(always)]
fn split_triples_generic(source: &[i16], first: &mut [i16], second: &mut [i16], third: &mut [i16]) {
    for (((triple, a), b), c) in source.chunks_exact(3).zip(first).zip(second).zip(third) {
        *a = triple[0];
        *b = triple[1];
        *c = triple[2];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn yuyv_is_the_formula_for_every_colour() {
        // All pairs of chroma with a few lumas, and all lumas with a few chromas.
        let few = [0u8, 1, 15, 16, 17, 100, 127, 128, 129, 200, 235, 236, 254, 255];
        let all = 0..=255u8;
        let mut source = Vec::new();
        for u in all.clone() {
            for v in all.clone() {
                for y in few.chunks_exact(2) {
                    source.extend([y[0], u, y[1], v]);
                }
            }
        }
        for y in all {
            for (u, v) in few.iter().flat_map(|&u| few.map(|v| (u, v))) {
                source.extend([y, u, 255 - y, v]);
            }
        }
        for isa in Isa::all_available() {
            let n = source.len() / 2;
            let (mut red, mut green, mut blue) = (vec![0; n], vec![0; n], vec![0; n]);
            yuyv_to_planar(isa, &source, &mut red, &mut green, &mut blue);
            for (i, pair) in source.chunks_exact(4).enumerate() {
                let (u, v) = (i32::from(pair[1]) - 128, i32::from(pair[3]) - 128);
                for (i, y) in [(2 * i, pair[0]), (2 * i + 1, pair[2])] {
                    let luma = 298 * (i32::from(y) - 16) + 128;
                    let wanted = [luma + 409 * v, luma - 100 * u - 208 * v, luma + 516 * u].map(|x| (x >> 8).clamp(0, 255) as u8);
                    assert_eq!([red[i], green[i], blue[i]], wanted, "{}: Y{y} U{} V{}", isa.name(), pair[1], pair[3]);
                }
            }
        }
    }

    #[test]
    fn ycc_is_libjpegs_formula_for_every_colour() {
        for isa in Isa::all_available() {
            for y in [0u8, 1, 77, 128, 200, 254, 255] {
                let cb: Vec<u8> = (0..=65_535u32).map(|i| (i >> 8) as u8).collect();
                let cr: Vec<u8> = (0..=65_535u32).map(|i| i as u8).collect();
                let (mut red, mut green, mut blue) = (vec![0; 65_536], vec![0; 65_536], vec![0; 65_536]);
                ycc_to_planar(isa, &vec![y; 65_536], &cb, &cr, &mut red, &mut green, &mut blue);
                for (i, (&cb, &cr)) in cb.iter().zip(&cr).enumerate() {
                    let (luma, u, v) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
                    let wanted = [
                        luma + ((91_881 * v + 32_768) >> 16),
                        luma + ((-22_554 * u - 46_802 * v + 32_768) >> 16),
                        luma + ((116_130 * u + 32_768) >> 16),
                    ];
                    assert_eq!([red[i], green[i], blue[i]], wanted.map(|x| x.clamp(0, 255) as u8), "{}: Y{y} {u} {v}", isa.name());
                }
            }
        }
    }

    proptest! {
        #[test]
        fn upsampling_is_libjpegs(near in vec(any::<u8>(), 3..200), seed in any::<u8>()) {
            let far: Vec<u8> = near.iter().map(|x| x.wrapping_mul(31).wrapping_add(seed)).collect();
            let n = near.len();
            // jdsample.c, h2v1_fancy_upsample and h2v2_fancy_upsample, sample by sample.
            let h2v1: Vec<u8> = (0..2 * n).map(|x| {
                let (i, right) = (x / 2, x % 2 == 1);
                let other = if right { (i + 1).min(n - 1) } else { i.saturating_sub(1) };
                ((3 * u32::from(near[i]) + u32::from(near[other]) + if right { 2 } else { 1 }) >> 2) as u8
            }).collect();
            let column = |i: usize| 3 * u32::from(near[i]) + u32::from(far[i]);
            let h2v2: Vec<u8> = (0..2 * n).map(|x| {
                let (i, right) = (x / 2, x % 2 == 1);
                let other = if right { (i + 1).min(n - 1) } else { i.saturating_sub(1) };
                ((3 * column(i) + column(other) + if right { 7 } else { 8 }) >> 4) as u8
            }).collect();
            for isa in Isa::all_available() {
                let mut out = vec![0; 2 * n + 3];
                upsample_h2v1(isa, &near, &mut out);
                prop_assert_eq!(&out[..2 * n], &h2v1[..], "{}", isa.name());
                upsample_h2v2(isa, &near, &far, &mut out);
                prop_assert_eq!(&out[..2 * n], &h2v2[..], "{}", isa.name());
            }
        }

        #[test]
        fn planes_and_triples_are_each_others_inverse(rgb in vec(any::<u8>(), 0..300)) {
            let n = rgb.len() / 3;
            let wide: Vec<i16> = rgb.iter().map(|&x| i16::from(x)).collect();
            for isa in Isa::all_available() {
                let (mut a, mut b, mut c) = (vec![0; n], vec![0; n], vec![0; n]);
                split_triples(isa, &wide, &mut a, &mut b, &mut c);
                let narrow = |plane: &[i16]| plane.iter().map(|&x| x as u8).collect::<Vec<_>>();
                let mut again = vec![0; n * 3];
                planar_to_rgb(isa, &narrow(&a), &narrow(&b), &narrow(&c), &mut again);
                prop_assert_eq!(&again[..], &rgb[..n * 3], "{}", isa.name());
            }
        }
    }

    #[test]
    fn narrow_chroma_is_doubled_plainly() {
        for isa in Isa::all_available() {
            let mut out = [9; 4];
            upsample_h2v1(isa, &[3, 200], &mut out);
            assert_eq!(out, [3, 3, 200, 200]);
            upsample_h2v2(isa, &[3, 200], &[90, 90], &mut out);
            assert_eq!(out, [3, 3, 200, 200]);
        }
    }
}
