//! Where training runs: a GPU through wgpu (Vulkan, Metal, DX12) when there is one, else the CPU; and the start-up check that the
//! chosen device computes what the CPU computes.

use crate::engine::all_threads;
use crate::optimiser::{Optimiser, OptimiserConfig};
use crate::uniad::{Kind as Weight, Uniad, UniadConfig, Weights, host, mse};
use burn::tensor::wgpu::WgpuInitError;
use burn::tensor::{Device, DeviceKind, Tensor, TensorData};
use cull::kernels::isa::Isa;
use rand::{Rng, SeedableRng};

/// A GPU step may differ from the CPU's by this much (relative norm): float32 sums in another order stay two decades below it, a wrong kernel
/// (burn #5626) is decades above.
const PARITY_TOLERANCE: f64 = 1e-3;

/// Samples a step in the check of a software GPU.
const SOFTWARE_BATCH: usize = 2;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// A GPU when there is one, else the CPU.
    Auto,
    /// wgpu or an error; a software Vulkan driver counts.
    Gpu,
    /// The CPU: [`crate::engine`], and burn's flex backend for what it lacks.
    Cpu,
}

/// A chosen device.
pub struct Chosen {
    /// The device, without autodiff.
    pub device: Device,
    /// One line for the user: what it is and why.
    pub describe: String,
    /// What kind of device it is.
    pub kind: Kind,
    /// Threads that compute where the device is the CPU.
    pub threads: usize,
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The CPU: [`crate::engine`], and burn's flex backend for what it lacks.
    Cpu,
    /// A GPU through wgpu.
    Gpu,
    /// A Vulkan driver that computes on the CPU (lavapipe), through wgpu.
    SoftwareGpu,
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

/// Pick the device. [`Chosen::check`] says whether it can be trusted.
///
/// # Errors
/// When a GPU was asked for and none answers.
pub fn choose(choice: Choice) -> Result<Chosen, DeviceError> {
    if choice == Choice::Cpu {
        return Ok(Chosen::cpu(all_threads()));
    }
    let mut last = String::from("no adapter");
    let real = [
        (DeviceKind::DiscreteGpu(0), "discrete GPU", Kind::Gpu),
        (DeviceKind::IntegratedGpu(0), "integrated GPU", Kind::Gpu),
        (DeviceKind::VirtualGpu(0), "virtual GPU", Kind::Gpu),
    ];
    let software = [(DeviceKind::Cpu, "software Vulkan", Kind::SoftwareGpu)];
    let kinds = real.into_iter().chain(software.into_iter().filter(|_| choice == Choice::Gpu));
    for (selector, name, kind) in kinds {
        // wgpu reports a missing adapter as an error or, in some drivers, by a panic: both mean the same here.
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| open(selector)));
        match opened {
            Ok(Ok(device)) => {
                let describe = match device.identity() {
                    Some(identity) => format!("{name} through wgpu: {}", identity.name),
                    None => format!("{name} through wgpu"),
                };
                return Ok(Chosen { device, describe, kind, threads: all_threads() });
            }
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = format!("{name}: the driver panicked"),
        }
    }
    if choice == Choice::Gpu {
        return Err(DeviceError::None(last));
    }
    let mut cpu = Chosen::cpu(all_threads());
    cpu.describe.push_str("; no GPU answers through wgpu");
    Ok(cpu)
}

fn open(kind: DeviceKind) -> Result<Device, WgpuInitError> {
    Device::wgpu_options().device_kind(kind).init()
}

impl Chosen {
    /// The CPU with so many threads: [`crate::engine`] where it can do the work, burn's flex backend where not.
    pub fn cpu(threads: usize) -> Self {
        Self { device: Device::flex(), describe: "CPU".into(), kind: Kind::Cpu, threads: threads.max(1) }.with_threads(None)
    }

    /// With another number of threads, if one is given.
    pub fn with_threads(mut self, threads: Option<usize>) -> Self {
        self.threads = threads.unwrap_or(self.threads).max(1);
        if self.kind == Kind::Cpu {
            let why = self.describe.split_once("; ").map(|(_, why)| format!("; {why}")).unwrap_or_default();
            let plural = if self.threads == 1 { "" } else { "s" };
            self.describe = format!("CPU, {} thread{plural}, {}{why}", self.threads, Isa::best().float().name());
        }
        self
    }

    /// Check that a GPU computes what the CPU computes in the shapes that `model` will be trained in with `batch` samples a step; the CPU needs no
    /// check. A software GPU is checked with `SOFTWARE_BATCH` samples at most: it takes minutes for what a GPU does in a second.
    ///
    /// # Errors
    /// [`DeviceError::Parity`] naming the first quantity that differs.
    pub fn check(&self, model: &UniadConfig, batch: usize) -> Result<(), DeviceError> {
        match self.kind {
            Kind::Cpu => Ok(()),
            Kind::Gpu => check_parity(&self.device, &self.describe, model, batch),
            Kind::SoftwareGpu => check_parity(&self.device, &self.describe, model, batch.min(SOFTWARE_BATCH)),
        }
    }
}

/// A named quantity of a training step.
type Figure = (String, Vec<f32>);

/// One training step on `device` and on the CPU: loss, every gradient and every weight after the step must agree. `model` is cut down to one layer of
/// each kind (all layers have the same shapes, and kernels are chosen by shape), without the random parts.
///
/// # Errors
/// [`DeviceError::Parity`] naming the first quantity that differs.
pub fn check_parity(device: &Device, describe: &str, model: &UniadConfig, batch: usize) -> Result<(), DeviceError> {
    let mut config = model.clone();
    config.encoder_layers = config.encoder_layers.min(1);
    // Without the layer-wise query the second layer's query is the first one's output: another shape.
    config.decoder_layers = config.decoder_layers.min(if config.layerwise_query { 1 } else { 2 });
    (config.dropout, config.jitter_scale, config.jitter_probability) = (0.0, 0.0, 0.0);
    let ours = figures(device, &config, batch);
    let reference = figures(&Device::flex(), &config, batch);
    compare(describe, &ours, &reference)
}

/// One training step of `config` on made-up features.
fn figures(device: &Device, config: &UniadConfig, batch: usize) -> Vec<Figure> {
    let grad_device = device.clone().autodiff();
    let weights = Weights::init(config, 5, device).as_leaves();
    let mut rng = rand_pcg::Pcg64::seed_from_u64(6);
    let n = batch * config.tokens() * config.channels;
    let data: Vec<f32> = (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
    let input = Tensor::<3>::from_data(TensorData::new(data, [batch, config.tokens(), config.channels]), &grad_device);
    let model = Uniad::new(config.clone(), &grad_device);
    let loss = mse(model.forward(&weights, input.clone(), true), input);
    let mut all = vec![("the loss".to_owned(), host(loss.clone().inner()))];
    let grads = loss.backward();
    let gathered: Vec<Tensor<2>> =
        weights.values.iter().map(|w| w.grad(&grads).unwrap_or_else(|| w.clone().inner().zeros_like())).collect();
    for ((name, _), g) in weights.layout.iter().zip(&gathered) {
        // A key's bias has a true gradient of zero: what is left is rounding, on any device.
        if !name.ends_with(".k.bias") {
            all.push((format!("the gradient of {name}"), host(g.clone())));
        }
    }
    let mut plain: Vec<Tensor<2>> = weights.values.iter().map(|w| w.clone().inner()).collect();
    Optimiser::new(OptimiserConfig::default()).step(&mut plain, gathered, 1e-4);
    for ((name, kind), w) in weights.layout.iter().zip(&plain) {
        // Adam's first step is the sign of the gradient: where that is rounding, so is the step. Biases start at zero, so that nothing but such
        // signs would be compared.
        if !matches!(kind, Weight::Bias { .. }) {
            all.push((format!("weight {name} after a step"), host(w.clone())));
        }
    }
    all
}

fn compare(describe: &str, ours: &[Figure], reference: &[Figure]) -> Result<(), DeviceError> {
    let refuse = |what: &str, error: f64| Err(DeviceError::Parity { device: describe.to_owned(), what: what.to_owned(), error });
    for (i, (what, b)) in reference.iter().enumerate() {
        let Some((_, a)) = ours.get(i).filter(|(name, a)| name == what && a.len() == b.len()) else { return refuse(what, f64::INFINITY) };
        let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let size: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
        let error = (difference / size.max(1e-12)).sqrt();
        if error.is_nan() || error >= PARITY_TOLERANCE {
            return refuse(what, error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uniad::NeighbourMask;

    fn small() -> UniadConfig {
        UniadConfig {
            grid: [4, 5],
            dim: 16,
            heads: 2,
            hidden: 24,
            encoder_layers: 3,
            decoder_layers: 3,
            mask: NeighbourMask::all(3),
            ..UniadConfig::paper(12)
        }
    }

    #[test]
    fn the_cpu_agrees_with_itself_and_needs_no_check() {
        check_parity(&Device::flex(), "flex", &small(), 3).unwrap();
        let chosen = choose(Choice::Cpu).unwrap();
        assert_eq!(chosen.kind, Kind::Cpu);
        chosen.check(&small(), 3).unwrap();
    }

    #[test]
    fn a_device_that_differs_is_refused_by_the_first_wrong_quantity() {
        let mut config = small();
        (config.encoder_layers, config.decoder_layers, config.dropout) = (1, 1, 0.0);
        let good = figures(&Device::flex(), &config, 3);
        let refused = |wrong: &[Figure], of: &str| match compare("a GPU", wrong, &good) {
            Err(DeviceError::Parity { device, what, error }) => {
                assert_eq!((device.as_str(), what.as_str()), ("a GPU", of));
                assert!(error.is_nan() || error >= PARITY_TOLERANCE, "{error}");
            }
            other => panic!("not refused: {other:?}"),
        };
        // What a wrong matrix kernel does: one row of one product is another one's.
        let at = good.iter().position(|(name, _)| name == "the gradient of encoder.0.attn.q.weight").unwrap();
        let mut wrong = good.clone();
        wrong[at].1.copy_within(0..config.dim, config.dim);
        refused(&wrong, "the gradient of encoder.0.attn.q.weight");
        let mut wrong = good.clone();
        wrong[at + 1].1[0] = f32::NAN;
        refused(&wrong, &good[at + 1].0.clone());
        // A loss that is a thousandth too large; a quantity missing.
        let mut wrong = good.clone();
        wrong[0].1[0] *= 1.002;
        refused(&wrong, "the loss");
        refused(&good[..at], "the gradient of encoder.0.attn.q.weight");
        // Rounding is no difference.
        let mut fine = good.clone();
        for v in fine.iter_mut().flat_map(|(_, values)| values) {
            *v *= 1.0 + 1e-6;
        }
        compare("a GPU", &fine, &good).unwrap();
    }
}
