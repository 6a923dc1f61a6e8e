//! Where training runs: a GPU through wgpu (Vulkan, Metal, DX12) when there is one, else the flex CPU backend; and the start-up check that the
//! chosen device computes what the CPU computes.

use crate::optimiser::{Optimiser, OptimiserConfig};
use crate::uniad::{NeighbourMask, Uniad, UniadConfig, Weights, host, mse};
use burn::tensor::wgpu::WgpuInitError;
use burn::tensor::{Device, DeviceKind, Tensor, TensorData};
use rand::{Rng, SeedableRng};

/// A GPU step may differ from the CPU's by this much (relative norm): float32 sums in another order stay two decades below it, a wrong kernel
/// (burn #5626) is decades above.
const PARITY_TOLERANCE: f64 = 1e-3;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// A GPU when there is one, else the CPU.
    Auto,
    /// wgpu or an error; a software Vulkan driver counts.
    Gpu,
    /// The flex CPU backend.
    Cpu,
}

/// A chosen device.
pub struct Chosen {
    /// The device, without autodiff.
    pub device: Device,
    /// One line for the user: what it is and why.
    pub describe: String,
    /// Runs through wgpu.
    pub gpu: bool,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No adapter.
    #[error("no GPU answers through wgpu ({0}); install its Vulkan driver, or train with --device cpu")]
    None(String),
    /// The parity check failed.
    #[error(
        "{device} does not compute what the CPU computes: {what} differs by {error:.1e} (allowed {PARITY_TOLERANCE:.0e}); train with --device cpu"
    )]
    Parity {
        /// Device.
        device: String,
        /// First quantity that differs.
        what: String,
        /// Relative error.
        error: f64,
    },
}

/// Pick the device and, for a GPU, check it against the CPU.
///
/// # Errors
/// When a GPU was asked for and there is none, or when the device found computes something else than the CPU.
pub fn choose(choice: Choice) -> Result<Chosen, DeviceError> {
    let cpu = |why: &str| Chosen { device: Device::flex(), describe: format!("CPU (burn flex){why}"), gpu: false };
    if choice == Choice::Cpu {
        return Ok(cpu(""));
    }
    let open = |kind: DeviceKind| -> Result<Device, WgpuInitError> { Device::wgpu_options().device_kind(kind).init() };
    let mut last = String::from("no adapter");
    let real = [
        (DeviceKind::DiscreteGpu(0), "discrete GPU"),
        (DeviceKind::IntegratedGpu(0), "integrated GPU"),
        (DeviceKind::VirtualGpu(0), "virtual GPU"),
    ];
    let software = [(DeviceKind::Cpu, "software Vulkan")];
    let kinds = real.into_iter().chain(software.into_iter().filter(|_| choice == Choice::Gpu));
    for (kind, name) in kinds {
        // wgpu reports a missing adapter as an error or, in some drivers, by a panic: both mean the same here.
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| open(kind)));
        match opened {
            Ok(Ok(device)) => {
                let describe = match device.identity() {
                    Some(identity) => format!("{name} through wgpu: {}", identity.name),
                    None => format!("{name} through wgpu"),
                };
                check_parity(&device, &describe)?;
                return Ok(Chosen { device, describe, gpu: true });
            }
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = format!("{name}: the driver panicked"),
        }
    }
    if choice == Choice::Gpu { Err(DeviceError::None(last)) } else { Ok(cpu("; no GPU answers through wgpu")) }
}

/// One training step of a small model on `device` and on the CPU: loss, every gradient, every weight after the step must agree.
///
/// # Errors
/// [`DeviceError::Parity`] naming the first quantity that differs.
pub fn check_parity(device: &Device, describe: &str) -> Result<(), DeviceError> {
    let config = UniadConfig {
        channels: 24,
        grid: [7, 6],
        dim: 32,
        heads: 4,
        hidden: 64,
        encoder_layers: 1,
        decoder_layers: 2,
        mask: NeighbourMask::all(5),
        layerwise_query: true,
        dropout: 0.0,
        jitter_scale: 0.0,
        jitter_probability: 0.0,
    };
    let step = |device: &Device| -> Vec<(String, Vec<f32>)> {
        let grad_device = device.clone().autodiff();
        let weights = Weights::init(&config, 5, device).as_leaves();
        let mut rng = rand_pcg::Pcg64::seed_from_u64(6);
        let n = 2 * config.tokens() * config.channels;
        let data: Vec<f32> = (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
        let input = Tensor::<3>::from_data(TensorData::new(data, [2, config.tokens(), config.channels]), &grad_device);
        let model = Uniad::new(config.clone(), &grad_device);
        let loss = mse(model.forward(&weights, input.clone(), true), input);
        let mut all = vec![("the loss".to_owned(), host(loss.clone().inner()))];
        let grads = loss.backward();
        let gathered: Vec<Tensor<2>> = weights.values.iter().filter_map(|w| w.grad(&grads)).collect();
        for ((name, _), g) in weights.layout.iter().zip(&gathered) {
            // A key's bias has a true gradient of zero: what is left is rounding, on any device.
            if !name.ends_with(".k.bias") {
                all.push((format!("the gradient of {name}"), host(g.clone())));
            }
        }
        let mut plain: Vec<Tensor<2>> = weights.values.iter().map(|w| w.clone().inner()).collect();
        Optimiser::new(OptimiserConfig::default()).step(&mut plain, gathered, 1e-4);
        for ((name, _), w) in weights.layout.iter().zip(&plain) {
            // Adam's first step is the sign of the gradient: where that is rounding, so is the step.
            if !name.ends_with(".k.bias") {
                all.push((format!("weight {name} after a step"), host(w.clone())));
            }
        }
        all
    };
    let reference = step(&Device::flex());
    let ours = step(device);
    for ((what, a), (_, b)) in ours.iter().zip(&reference) {
        let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let size: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
        let error = (difference / size.max(1e-12)).sqrt();
        // NaN compares false: ask for "small enough", not for "too large".
        if !(error < PARITY_TOLERANCE && a.len() == b.len()) {
            return Err(DeviceError::Parity { device: describe.to_owned(), what: what.clone(), error });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself() {
        check_parity(&Device::flex(), "flex").unwrap();
    }
}
