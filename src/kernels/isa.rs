//! Which instruction sets this machine has, and which one a kernel should use.

use std::sync::OnceLock;

/// Instruction set of a kernel, ascending in speed within an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, everywhere: the oracle.
    Generic,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX2, FMA and AVX-VNNI (int8 dot products without AVX-512: Alder Lake, N100).
    AvxVnni,
    /// x86-64 with AVX-512 F and BW.
    Avx512,
    /// x86-64 with AVX-512 F, BW and VNNI (int8 dot products).
    Avx512Vnni,
    /// aarch64 with NEON (all of them).
    Neon,
    /// aarch64 with the dot-product extension (SDOT).
    NeonDot,
    /// aarch64 with the int8 matrix extension (SMMLA).
    NeonI8mm,
}

impl Isa {
    /// Can this machine run it?
    pub fn available(self) -> bool {
        match self {
            Self::Generic => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Self::Avx512.available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => Self::NeonDot.available() && std::arch::is_aarch64_feature_detected!("i8mm"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Every set, slower ones first within an architecture.
    const ALL: [Self; 8] =
        [Self::Generic, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni, Self::Neon, Self::NeonDot, Self::NeonI8mm];

    /// Every set this machine can run, the fastest last.
    pub fn all_available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.available()).collect()
    }

    /// The fastest this machine can run; `CULL_ISA` ([`Isa::name`], for example `avx2`) holds it down, for tests and for comparing.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let all = Self::all_available();
            let best = all.last().copied().unwrap_or(Self::Generic);
            let Ok(wanted) = std::env::var("CULL_ISA") else { return best };
            all.iter().copied().find(|isa| wanted.eq_ignore_ascii_case(isa.name())).unwrap_or_else(|| {
                let names: Vec<_> = all.iter().map(|isa| isa.name()).collect();
                log::warn!("CULL_ISA={wanted} is none of what this machine has ({}): using {}", names.join(", "), best.name());
                best
            })
        })
    }

    /// The set whose float kernels this one uses: [`Isa::Generic`], [`Isa::Avx2`], [`Isa::Avx512`] or [`Isa::Neon`]. The others differ in integers only.
    pub fn float(self) -> Self {
        match self {
            Self::Generic => Self::Generic,
            Self::Avx2 | Self::AvxVnni => Self::Avx2,
            Self::Avx512 | Self::Avx512Vnni => Self::Avx512,
            Self::Neon | Self::NeonDot | Self::NeonI8mm => Self::Neon,
        }
    }

    /// Short lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::NeonI8mm => "neoni8mm",
        }
    }
}

/// Compile a plain function once per set of float instructions, for the compiler to vectorise, and choose by the argument `isa`. On aarch64 NEON is part
/// of the base set, so the plain one is the NEON one.
macro_rules! per_isa {
    ($(#[$doc:meta])* pub fn $name:ident $(<$op:ident: $bound:path>)? ($($argument:ident: $type:ty),* $(,)?) => $generic:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name $(<$op: $bound>)? (isa: Isa, $($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$op: $bound>)? ($($argument: $type),*) {
                $generic($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$op: $bound>)? ($($argument: $type),*) {
                $generic($($argument),*)
            }
            assert!(isa.available(), "{} is not available here", isa.name());
            match isa.float() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the instruction set is there, the assert above says so; the function itself is safe.
                Isa::Avx512 => unsafe { avx512($($argument),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { avx2($($argument),*) },
                _ => $generic($($argument),*),
            }
        }
    };
}
pub(super) use per_isa;
