//! Plain loops compiled for the instruction set at hand: what the compiler vectorises by itself needs no intrinsics, only to be told what the machine has.

use super::isa::Isa;

/// Runs `work`, compiled once for each instruction set. Give it a closure marked `#[inline(always)]` and keep the functions it calls
/// `#[inline(always)]` too: what is not inlined is compiled for the least machine. The compiler reorders no float sums and fuses no products, so that
/// every set gives the same bits.
pub fn vectorise<R>(isa: Isa, work: impl FnOnce() -> R) -> R {
    if !isa.available() {
        return work();
    }
    match isa.float() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has the instruction set.
        Isa::Avx512 => unsafe { avx512(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2(work) },
        // NEON belongs to every aarch64: no need to name it.
        _ => work(),
    }
}

/// # Safety
/// AVX-512F, BW, DQ and VL must be there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// # Safety
/// AVX2 and FMA must be there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_gives_the_same_bits() {
        let from: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let run = |isa: Isa| -> Vec<u32> {
            vectorise(
                isa,
                #[inline(always)]
                || from.iter().zip(from.iter().rev()).map(|(x, y)| (x * y + x).to_bits()).collect(),
            )
        };
        let wanted = run(Isa::Generic);
        for isa in Isa::all_available() {
            assert_eq!(run(isa), wanted, "{}", isa.name());
        }
    }
}
