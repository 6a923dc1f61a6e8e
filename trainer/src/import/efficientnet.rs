//! EfficientNet-B0 to B4 (Tan and Le, ICML 2019) as a backbone for UniAD: batch norms folded, cut off after the last stage used, outputs at strides
//! 2, 4, 8 and 16 as the paper takes them (blocks 1, 5, 9 and 21 of B4: 24 + 32 + 56 + 160 channels).
//!
//! Knows names, shapes and paddings of the four publications of these weights; reads them through [`WeightFile`] and writes through [`Graph`].

use super::weights::{WeightError, WeightFile};
use crate::onnx::{Attr, Graph, PixelScale};
use std::collections::BTreeSet;

/// Pixel statistics of ImageNet in 8-bit units (torchvision, timm and the original TensorFlow training use them).
pub const IMAGENET_PIXELS: PixelScale = PixelScale { mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375] };
/// PyTorch's default batch norm epsilon.
const EPSILON_TORCH: f64 = 1e-5;
/// Batch norm epsilon of the TensorFlow networks.
const EPSILON_TF: f64 = 1e-3;
/// Channel counts are rounded to multiples of this.
const DIVISOR: usize = 8;
/// Share of a block's input channels that squeeze-and-excitation keeps: one in this many.
const SQUEEZE: usize = 4;
/// The last stage that is computed: its output has stride 16.
const LAST_STAGE: usize = 5;

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Arch {
    /// 16 + 24 + 40 + 112 = 192 channels.
    #[value(name = "efficientnet-b0")]
    B0,
    /// 16 + 24 + 40 + 112 = 192 channels, deeper.
    #[value(name = "efficientnet-b1")]
    B1,
    /// 16 + 24 + 48 + 120 = 208 channels.
    #[value(name = "efficientnet-b2")]
    B2,
    /// 24 + 32 + 48 + 136 = 240 channels.
    #[value(name = "efficientnet-b3")]
    B3,
    /// 24 + 32 + 56 + 160 = 272 channels: the paper's.
    #[value(name = "efficientnet-b4")]
    B4,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::B0, Self::B1, Self::B2, Self::B3, Self::B4];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        ["efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3", "efficientnet-b4"][self as usize]
    }

    /// Width and depth multipliers (paper, table 8 of the TensorFlow sources) and the input side in pixels that it was trained at.
    fn scaling(self) -> (f64, f64, usize) {
        match self {
            Self::B0 => (1.0, 1.0, 224),
            Self::B1 => (1.0, 1.1, 240),
            Self::B2 => (1.1, 1.2, 260),
            Self::B3 => (1.2, 1.4, 300),
            Self::B4 => (1.4, 1.8, 380),
        }
    }

    fn channels(self, base: usize) -> usize {
        let wanted = base as f64 * self.scaling().0;
        let rounded = ((wanted + DIVISOR as f64 / 2.0) as usize / DIVISOR * DIVISOR).max(DIVISOR);
        if (rounded as f64) < 0.9 * wanted { rounded + DIVISOR } else { rounded }
    }

    /// Channels after the stem.
    fn stem(self) -> usize {
        self.channels(32)
    }

    /// All blocks in order, the unused last two stages too (they tell the networks apart).
    fn blocks(self) -> Vec<Block> {
        // Kernel, stride, expansion, base channels in and out, base repeats (paper, table 1).
        const STAGES: [(usize, usize, usize, usize, usize, usize); 7] = [
            (3, 1, 1, 32, 16, 1),
            (3, 2, 6, 16, 24, 2),
            (5, 2, 6, 24, 40, 2),
            (3, 2, 6, 40, 80, 3),
            (5, 1, 6, 80, 112, 3),
            (5, 2, 6, 112, 192, 4),
            (3, 1, 6, 192, 320, 1),
        ];
        let mut blocks = Vec::new();
        for (i, (kernel, stride, expand, inputs, outputs, repeats)) in STAGES.into_iter().enumerate() {
            let repeats = (repeats as f64 * self.scaling().1).ceil() as usize;
            for repeat in 0..repeats {
                let (inputs, stride) = if repeat == 0 { (self.channels(inputs), stride) } else { (self.channels(outputs), 1) };
                let (index, outputs) = (blocks.len(), self.channels(outputs));
                blocks.push(Block { stage: i + 1, repeat, repeats, index, kernel, stride, expand, inputs, outputs });
            }
        }
        blocks
    }
}

/// One inverted residual block.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// 1 to 7.
    stage: usize,
    /// Number in the stage, from 0.
    repeat: usize,
    /// Blocks in the stage.
    repeats: usize,
    /// Number in the network, from 0.
    index: usize,
    kernel: usize,
    stride: usize,
    expand: usize,
    inputs: usize,
    outputs: usize,
}

/// Whose file it is: decides names, batch norm epsilon and padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// torchvision: symmetric padding, epsilon 1e-5.
    Torchvision,
    /// timm's `efficientnet_b*`: symmetric padding, epsilon 1e-5.
    Timm,
    /// timm's `tf_efficientnet_b*`: TensorFlow's padding for the input size used, epsilon 1e-3.
    TimmTf,
    /// lukemelas' EfficientNet-PyTorch, the paper's: epsilon 1e-3, TensorFlow's padding for the size that the network was trained at, whatever the input
    /// (both that package and UniAD's own code compute it once, from the native size).
    Lukemelas,
}

impl Source {
    /// What a file's names say; `None` when they are nobody's.
    ///
    /// timm's two families have the same names: [`Source::Timm`] stands for both here.
    pub fn of(file: &WeightFile) -> Option<Self> {
        let names: BTreeSet<&str> = file.names().collect();
        [("features.0.0.weight", Self::Torchvision), ("conv_stem.weight", Self::Timm), ("_conv_stem.weight", Self::Lukemelas)]
            .into_iter()
            .find_map(|(name, source)| names.contains(name).then_some(source))
    }

    fn epsilon(self) -> f64 {
        match self {
            Self::Torchvision | Self::Timm => EPSILON_TORCH,
            Self::TimmTf | Self::Lukemelas => EPSILON_TF,
        }
    }

    /// Padding as this source does it.
    pub fn padding(self, arch: Arch, input_px: usize) -> Padding {
        match self {
            Self::Torchvision | Self::Timm => Padding::Symmetric,
            Self::TimmTf => Padding::Same { side_px: input_px },
            Self::Lukemelas => Padding::Same { side_px: arch.scaling().2 },
        }
    }

    /// Convolution and batch norm of the stem.
    fn stem(self) -> (&'static str, &'static str) {
        match self {
            Self::Torchvision => ("features.0.0", "features.0.1"),
            Self::Timm | Self::TimmTf => ("conv_stem", "bn1"),
            Self::Lukemelas => ("_conv_stem", "_bn0"),
        }
    }

    /// Names in a block: `[convolution, batch norm]` of expansion (where there is one), depthwise and projection, then the two of squeeze-and-excitation.
    fn names(self, b: &Block) -> BlockNames {
        let pair = |conv: String, norm: String| [conv, norm];
        let has_expand = b.expand != 1;
        match self {
            Self::Torchvision => {
                let p = format!("features.{}.{}.block", b.stage, b.repeat);
                let at = usize::from(has_expand);
                BlockNames {
                    expand: pair(format!("{p}.0.0"), format!("{p}.0.1")),
                    depthwise: pair(format!("{p}.{at}.0"), format!("{p}.{at}.1")),
                    squeeze: [format!("{p}.{}.fc1", at + 1), format!("{p}.{}.fc2", at + 1)],
                    project: pair(format!("{p}.{}.0", at + 2), format!("{p}.{}.1", at + 2)),
                }
            }
            Self::Timm | Self::TimmTf => {
                let p = format!("blocks.{}.{}", b.stage - 1, b.repeat);
                let squeeze = [format!("{p}.se.conv_reduce"), format!("{p}.se.conv_expand")];
                let expand = pair(format!("{p}.conv_pw"), format!("{p}.bn1"));
                if has_expand {
                    let depthwise = pair(format!("{p}.conv_dw"), format!("{p}.bn2"));
                    BlockNames { expand, depthwise, squeeze, project: pair(format!("{p}.conv_pwl"), format!("{p}.bn3")) }
                } else {
                    let depthwise = pair(format!("{p}.conv_dw"), format!("{p}.bn1"));
                    BlockNames { expand, depthwise, squeeze, project: pair(format!("{p}.conv_pw"), format!("{p}.bn2")) }
                }
            }
            Self::Lukemelas => {
                let p = format!("_blocks.{}", b.index);
                BlockNames {
                    expand: pair(format!("{p}._expand_conv"), format!("{p}._bn0")),
                    depthwise: pair(format!("{p}._depthwise_conv"), format!("{p}._bn1")),
                    squeeze: [format!("{p}._se_reduce"), format!("{p}._se_expand")],
                    project: pair(format!("{p}._project_conv"), format!("{p}._bn2")),
                }
            }
        }
    }
}

struct BlockNames {
    expand: [String; 2],
    depthwise: [String; 2],
    squeeze: [String; 2],
    project: [String; 2],
}

/// How convolutions pad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// `kernel / 2` on every side.
    Symmetric,
    /// TensorFlow's SAME for an input of this side: as little as gives `ceil(size / stride)`, the odd pixel at the bottom and right.
    Same {
        /// Side of the network's input in pixels.
        side_px: usize,
    },
}

impl Padding {
    /// `[top, left, bottom, right]` of a convolution over `size` pixels.
    fn pads(self, size: usize, kernel: usize, stride: usize) -> [i64; 4] {
        let (before, after) = match self {
            Self::Symmetric => (kernel / 2, kernel / 2),
            Self::Same { .. } => {
                let total = ((size.div_ceil(stride).max(1) - 1) * stride + kernel).saturating_sub(size);
                (total / 2, total - total / 2)
            }
        };
        [before as i64, before as i64, after as i64, after as i64]
    }

    fn start(self) -> usize {
        match self {
            Self::Symmetric => 0,
            Self::Same { side_px } => side_px,
        }
    }
}

/// Why weights cannot become a backbone.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The names are nobody's.
    #[error(
        "the tensors have none of the names that torchvision, timm or lukemelas give an EfficientNet (the first is called {first}): give such a file"
    )]
    Unknown {
        /// First name in the file.
        first: String,
    },
    /// Tensors missing or of another shape.
    #[error("these are not the weights of {arch}: {why}{hint}")]
    OtherNetwork {
        /// Network wanted.
        arch: &'static str,
        /// First tensor that differs.
        why: String,
        /// What it is instead, where that is known.
        hint: String,
    },
    /// A weight that is no number.
    #[error("tensor {name} holds {value}: the file is damaged, download it again")]
    NotFinite {
        /// Tensor.
        name: String,
        /// Value.
        value: f32,
    },
}

/// The network whose weights `file` holds; `None` when it is none of [`Arch::ALL`].
pub fn detect(file: &WeightFile, source: Source) -> Option<Arch> {
    Arch::ALL.into_iter().find(|arch| mismatch(file, source, *arch).is_none())
}

/// Name and shape of every tensor of `arch` up to its head, as `source` publishes them: `[out, in / groups, kernel, kernel]` for convolutions.
pub fn tensors(source: Source, arch: Arch) -> Vec<(String, Vec<usize>)> {
    let mut list = Vec::new();
    let mut conv_norm = |[conv, norm]: [&str; 2], shape: [usize; 4]| {
        list.push((format!("{conv}.weight"), shape.to_vec()));
        for part in ["weight", "bias", "running_mean", "running_var"] {
            list.push((format!("{norm}.{part}"), vec![shape[0]]));
        }
    };
    let (conv, norm) = source.stem();
    conv_norm([conv, norm], [arch.stem(), 3, 3, 3]);
    let mut plain = Vec::new();
    for block in arch.blocks() {
        let names = source.names(&block);
        let inner = block.inputs * block.expand;
        let mut part = |[conv, norm]: &[String; 2], shape| conv_norm([conv, norm], shape);
        if block.expand != 1 {
            part(&names.expand, [inner, block.inputs, 1, 1]);
        }
        part(&names.depthwise, [inner, 1, block.kernel, block.kernel]);
        part(&names.project, [block.outputs, inner, 1, 1]);
        let squeezed = block.inputs / SQUEEZE;
        let [reduce, expand] = names.squeeze;
        for (name, outputs, inputs) in [(reduce, squeezed, inner), (expand, inner, squeezed)] {
            plain.push((format!("{name}.weight"), vec![outputs, inputs, 1, 1]));
            plain.push((format!("{name}.bias"), vec![outputs]));
        }
    }
    list.extend(plain);
    list
}

/// The first thing in which `file` is not `arch`.
fn mismatch(file: &WeightFile, source: Source, arch: Arch) -> Option<String> {
    let wrong = tensors(source, arch).into_iter().find_map(|(name, wanted)| match file.shape(&name) {
        None => Some(format!("{name} is missing")),
        Some(shape) if shape != wanted => Some(format!("{name} has shape {shape:?}, expected {wanted:?}")),
        Some(_) => None,
    });
    if wrong.is_some() {
        return wrong;
    }
    // A deeper network has all of a shallower one's blocks and more. (lukemelas counts blocks through the network: only after the last is one too many.)
    let blocks = arch.blocks();
    let ends = blocks.iter().filter(|b| b.repeat + 1 == b.repeats && (source != Source::Lukemelas || b.index + 1 == blocks.len()));
    ends.map(|b| (b.stage, source.names(&Block { repeat: b.repeat + 1, index: b.index + 1, ..*b })))
        .find(|(_, names)| file.shape(&format!("{}.weight", names.depthwise[0])).is_some())
        .map(|(stage, names)| format!("it has a block more in stage {stage} ({})", names.depthwise[0]))
}

/// The backbone as ONNX: input `input` `[1, 3, height, width]`, outputs `f2`, `f4`, `f8`, `f16`; `pixels` goes into the metadata, so that the trainer
/// feeds the network as it was trained.
///
/// # Errors
/// When the file holds another network or a weight that is no number.
pub fn backbone(file: &WeightFile, source: Source, arch: Arch, padding: Padding, pixels: &PixelScale) -> Result<Backbone, ImportError> {
    if let Some(why) = mismatch(file, source, arch) {
        let hint = detect(file, source).map_or(String::new(), |other| format!("; they are those of {}: say --arch {0}", other.name()));
        return Err(ImportError::OtherNetwork { arch: arch.name(), why, hint });
    }
    let mut writer = Writer { graph: Graph::default(), file, source, arch, padding, size: padding.start(), weights: 0 };
    let (conv, norm) = source.stem();
    let mut x = writer.conv_norm("input", [conv, norm], [arch.stem(), 3, 3, 3], 2, 1)?;
    x = writer.silu(&x);
    let mut outputs = Vec::new();
    for block in arch.blocks().iter().filter(|b| b.stage <= LAST_STAGE) {
        x = writer.block(&x, block)?;
        let is_last = block.repeat + 1 == block.repeats;
        if let (true, Some(name)) = (
            is_last,
            match block.stage {
                1 => Some("f2"),
                2 => Some("f4"),
                3 => Some("f8"),
                5 => Some("f16"),
                _ => None,
            },
        ) {
            writer.graph.add_output(name, &x, &[Some(1), Some(block.outputs), None, None]);
            outputs.push((name, block.outputs));
        }
    }
    let weights = writer.weights;
    let mut graph = writer.graph;
    graph.set_input("input", &[Some(1), Some(3), None, None]);
    Ok(Backbone { onnx: graph.into_backbone_bytes("cull-trainer import-backbone", pixels), outputs, weights })
}

/// A finished backbone.
#[derive(Debug)]
pub struct Backbone {
    /// The ONNX file.
    pub onnx: Vec<u8>,
    /// Outputs and their channels.
    pub outputs: Vec<(&'static str, usize)>,
    /// Numbers in it.
    pub weights: usize,
}

struct Writer<'a> {
    graph: Graph,
    file: &'a WeightFile,
    source: Source,
    arch: Arch,
    padding: Padding,
    /// Side of the current tensor as the padding sees it.
    size: usize,
    weights: usize,
}

impl Writer<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ImportError> {
        let other = |why: String| ImportError::OtherNetwork { arch: self.arch.name(), why, hint: String::new() };
        let (found, values) = self.file.get(name)?.ok_or_else(|| other(format!("{name} is missing")))?;
        if found != shape {
            return Err(other(format!("{name} has shape {found:?}, expected {shape:?}")));
        }
        match values.iter().find(|v| !v.is_finite()) {
            Some(value) => Err(ImportError::NotFinite { name: name.to_owned(), value: *value }),
            None => Ok(values),
        }
    }

    /// A convolution without bias and its batch norm, folded into one in float64; `shape` is the weight's, `[out, in / groups, kernel, kernel]`.
    fn conv_norm(
        &mut self,
        x: &str,
        [conv, norm]: [&str; 2],
        shape: [usize; 4],
        stride: usize,
        groups: usize,
    ) -> Result<String, ImportError> {
        let [outputs, _, kernel, _] = shape;
        let mut weight = self.tensor(&format!("{conv}.weight"), &shape)?;
        let [scale, shift, mean, variance] =
            ["weight", "bias", "running_mean", "running_var"].map(|part| self.tensor(&format!("{norm}.{part}"), &[outputs]));
        let (scale, shift, mean, variance) = (scale?, shift?, mean?, variance?);
        let epsilon = self.source.epsilon();
        let mut bias = Vec::with_capacity(outputs);
        let each = scale.iter().zip(&shift).zip(&mean).zip(&variance);
        for (filter, (((scale, shift), mean), variance)) in weight.chunks_exact_mut(shape.iter().skip(1).product()).zip(each) {
            let factor = f64::from(*scale) / (f64::from(*variance) + epsilon).sqrt();
            for w in filter {
                *w = (f64::from(*w) * factor) as f32;
            }
            bias.push((f64::from(*shift) - f64::from(*mean) * factor) as f32);
        }
        if let Some(value) = weight.iter().chain(&bias).find(|v| !v.is_finite()) {
            // A negative variance, say.
            return Err(ImportError::NotFinite { name: norm.to_owned(), value: *value });
        }
        let pads = self.padding.pads(self.size, kernel, stride);
        self.size = self.size.div_ceil(stride);
        Ok(self.conv(x, conv, (&shape, &weight), &bias, stride, groups, &pads))
    }

    #[allow(clippy::too_many_arguments)]
    fn conv(
        &mut self,
        x: &str,
        name: &str,
        weight: (&[usize], &[f32]),
        bias: &[f32],
        stride: usize,
        groups: usize,
        pads: &[i64; 4],
    ) -> String {
        let (shape, values) = weight;
        self.weights += values.len() + bias.len();
        let kernel = shape.last().copied().unwrap_or(1) as i64;
        let weight = self.graph.floats(&format!("{name}.weight"), shape, values);
        let bias = self.graph.floats(&format!("{name}.bias"), &[bias.len()], bias);
        let stride = stride as i64;
        self.graph.node(
            "Conv",
            &[x, &weight, &bias],
            &[
                ("kernel_shape", Attr::Ints(&[kernel, kernel])),
                ("strides", Attr::Ints(&[stride, stride])),
                ("pads", Attr::Ints(pads)),
                ("dilations", Attr::Ints(&[1, 1])),
                ("group", Attr::Int(groups as i64)),
            ],
        )
    }

    fn silu(&mut self, x: &str) -> String {
        let gate = self.graph.node("Sigmoid", &[x], &[]);
        self.graph.node("Mul", &[x, &gate], &[])
    }

    fn block(&mut self, input: &str, b: &Block) -> Result<String, ImportError> {
        let names = self.source.names(b);
        let inner = b.inputs * b.expand;
        let mut x = input.to_owned();
        if b.expand != 1 {
            let [conv, norm] = &names.expand;
            x = self.conv_norm(&x, [conv, norm], [inner, b.inputs, 1, 1], 1, 1)?;
            x = self.silu(&x);
        }
        let [conv, norm] = &names.depthwise;
        x = self.conv_norm(&x, [conv, norm], [inner, 1, b.kernel, b.kernel], b.stride, inner)?;
        x = self.silu(&x);
        // Squeeze-and-excitation (Hu et al. 2018): two 1 x 1 convolutions with bias on the mean over the picture.
        let squeezed = b.inputs / SQUEEZE;
        let [reduce, expand] = &names.squeeze;
        let mut gate = self.graph.node("GlobalAveragePool", &[&x], &[]);
        gate = self.plain(&gate, reduce, [squeezed, inner, 1, 1])?;
        gate = self.silu(&gate);
        gate = self.plain(&gate, expand, [inner, squeezed, 1, 1])?;
        gate = self.graph.node("Sigmoid", &[&gate], &[]);
        x = self.graph.node("Mul", &[&x, &gate], &[]);
        let [conv, norm] = &names.project;
        x = self.conv_norm(&x, [conv, norm], [b.outputs, inner, 1, 1], 1, 1)?;
        if b.stride == 1 && b.inputs == b.outputs {
            x = self.graph.node("Add", &[&x, input], &[]);
        }
        Ok(x)
    }

    /// A 1 x 1 convolution with its own bias.
    fn plain(&mut self, x: &str, name: &str, shape: [usize; 4]) -> Result<String, ImportError> {
        let weight = self.tensor(&format!("{name}.weight"), &shape)?;
        let [outputs, ..] = shape;
        let bias = self.tensor(&format!("{name}.bias"), &[outputs])?;
        Ok(self.conv(x, name, (&shape, &weight), &bias, 1, 1, &[0; 4]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_have_their_published_widths_and_depths() {
        let stage_ends = |arch: Arch| -> Vec<(usize, usize)> {
            arch.blocks()
                .iter()
                .filter(|b| b.repeat + 1 == b.repeats && b.stage != 4 && b.stage <= LAST_STAGE)
                .map(|b| (b.index, b.outputs))
                .collect()
        };
        // DESIGN.md: blocks 1, 5, 9, 21 of B4, 24 + 32 + 56 + 160 channels.
        assert_eq!(stage_ends(Arch::B4), [(1, 24), (5, 32), (9, 56), (21, 160)]);
        assert_eq!(stage_ends(Arch::B0), [(0, 16), (2, 24), (4, 40), (10, 112)]);
        assert_eq!(Arch::ALL.map(|a| a.blocks().len()), [16, 23, 23, 26, 32]);
        assert_eq!(Arch::ALL.map(Arch::stem), [32, 32, 32, 40, 48]);
    }

    #[test]
    fn padding_is_tensorflows() {
        // Even: one pixel less in front. Odd: as much on both sides.
        let same = Padding::Same { side_px: 224 };
        assert_eq!(same.pads(224, 3, 2), [0, 0, 1, 1]);
        assert_eq!(same.pads(56, 5, 2), [1, 1, 2, 2]);
        assert_eq!(same.pads(95, 5, 2), [2, 2, 2, 2]);
        assert_eq!(same.pads(14, 5, 1), [2, 2, 2, 2]);
        assert_eq!(same.pads(14, 1, 1), [0; 4]);
        assert_eq!(Padding::Symmetric.pads(224, 3, 2), [1; 4]);
    }

    /// A file in memory with every tensor of a network, all numbers equal.
    fn file(source: Source, arch: Arch, value: f32) -> WeightFile {
        let tensors = tensors(source, arch);
        let data: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| value.to_le_bytes().repeat(shape.iter().product())).collect();
        let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
            (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
        });
        WeightFile::from_bytes(safetensors::serialize(views, None).unwrap(), "made up").unwrap()
    }

    #[test]
    fn every_network_is_told_from_the_others() {
        for source in [Source::Torchvision, Source::Timm, Source::Lukemelas] {
            for arch in [Arch::B0, Arch::B1, Arch::B3] {
                let file = file(source, arch, 0.01);
                assert_eq!(Source::of(&file), Some(source));
                assert_eq!(detect(&file, source), Some(arch), "{source:?} {arch:?}");
            }
        }
        // B1's blocks are all in there: only one block more shows that it is not B0.
        let error =
            backbone(&file(Source::Timm, Arch::B1, 0.01), Source::Timm, Arch::B0, Padding::Symmetric, &IMAGENET_PIXELS).unwrap_err();
        assert!(error.to_string().ends_with("they are those of efficientnet-b1: say --arch efficientnet-b1"), "{error}");
    }

    #[test]
    fn a_weight_that_is_no_number_is_named() {
        let error =
            backbone(&file(Source::Timm, Arch::B0, f32::NAN), Source::Timm, Arch::B0, Padding::Symmetric, &IMAGENET_PIXELS).unwrap_err();
        assert!(matches!(&error, ImportError::NotFinite { name, .. } if name == "conv_stem.weight"), "{error}");
        // A variance of -1 folds to NaN.
        let error =
            backbone(&file(Source::Timm, Arch::B0, -1.0), Source::Timm, Arch::B0, Padding::Symmetric, &IMAGENET_PIXELS).unwrap_err();
        assert!(matches!(&error, ImportError::NotFinite { name, .. } if name == "bn1"), "{error}");
    }
}
