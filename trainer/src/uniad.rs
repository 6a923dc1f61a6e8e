//! UniAD ("A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022, section 3) on burn tensors: weights, forward pass, loss.
//!
//! Knows tensors only: no files, no data sets, no schedule. Weights are a flat list of named matrices, so that optimisers, checkpoints and
//! the ONNX export all walk the same list. Linear weights are kept as `[in, out]` (the layout that a row-major product wants); the published
//! layout `[out, in]` appears only in [`Weights::from_published`] and [`Weights::to_published`].

use burn::tensor::{Device, Distribution, Tensor, TensorData, activation, module};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Added to the score of a forbidden pair of tokens before the softmax. Finite, so that a backend's `0 * inf` cannot make NaN, and far below
/// any real score.
const FORBIDDEN: f32 = -1e9;

/// Epsilon of every layer normalisation (PyTorch's default, which the paper uses).
const NORM_EPSILON: f64 = 1e-5;

/// Size and components of a UniAD model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UniadConfig {
    /// Feature channels in and out (272 for EfficientNet-B4).
    pub channels: usize,
    /// Rows and columns of the feature grid (14 x 14).
    pub grid: [usize; 2],
    /// Width of the transformer (256).
    pub dim: usize,
    /// Attention heads (8).
    pub heads: usize,
    /// Width of the feed-forward layers (1024).
    pub hidden: usize,
    /// Encoder layers (4).
    pub encoder_layers: usize,
    /// Decoder layers (4).
    pub decoder_layers: usize,
    /// Which attentions are neighbour-masked, and how far.
    pub mask: NeighbourMask,
    /// Layer-wise query embedding: every decoder layer has its own learned query. Without it only the first has one and the others take the
    /// previous layer's output as their query, as a plain decoder does.
    pub layerwise_query: bool,
    /// Dropout in training (0.1).
    pub dropout: f64,
    /// Feature jittering in training: scale of the noise (20), 0 for none.
    pub jitter_scale: f64,
    /// Feature jittering in training: share of the samples that are jittered (1).
    pub jitter_probability: f64,
}

/// Neighbour-masked attention (paper, section 3.2): side of the square window of tokens that a token may not attend to, per attention.
/// Odd; 0 for no mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighbourMask {
    /// Encoder self-attention.
    pub encoder: usize,
    /// Decoder attention to the encoder's output.
    pub decoder_memory: usize,
    /// Decoder attention to the previous layer's output.
    pub decoder_previous: usize,
}

impl NeighbourMask {
    /// The same window in all three attentions.
    pub fn all(size: usize) -> Self {
        Self { encoder: size, decoder_memory: size, decoder_previous: size }
    }
}

impl UniadConfig {
    /// The paper's model for features of `channels` channels on a 14 x 14 grid.
    pub fn paper(channels: usize) -> Self {
        Self {
            channels,
            grid: [14, 14],
            dim: 256,
            heads: 8,
            hidden: 1024,
            encoder_layers: 4,
            decoder_layers: 4,
            mask: NeighbourMask::all(7),
            layerwise_query: true,
            dropout: 0.1,
            jitter_scale: 20.0,
            jitter_probability: 1.0,
        }
    }

    /// Tokens on the grid.
    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// Check what the arithmetic relies on.
    ///
    /// # Errors
    /// One sentence naming the field and the accepted values.
    pub fn check(&self) -> Result<(), String> {
        if self.channels == 0 || self.tokens() == 0 || self.dim == 0 || self.hidden == 0 || self.heads == 0 {
            return Err("channels, grid, dim, hidden and heads must all be at least 1".into());
        }
        if !self.dim.is_multiple_of(self.heads) || !self.dim.is_multiple_of(2) {
            return Err(format!("dim {} must be even and a multiple of heads ({})", self.dim, self.heads));
        }
        for (name, size) in
            [("encoder", self.mask.encoder), ("decoder_memory", self.mask.decoder_memory), ("decoder_previous", self.mask.decoder_previous)]
        {
            if size != 0 && size % 2 == 0 {
                return Err(format!("the neighbour mask of {name} is {size}: it must be odd, or 0 for none"));
            }
            if size > 0 && size / 2 >= self.grid[0].max(self.grid[1]) / 2 {
                return Err(format!(
                    "the neighbour mask of {name} is {size}: it would hide the whole {}x{} grid",
                    self.grid[0], self.grid[1]
                ));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) || !(0.0..=1.0).contains(&self.jitter_probability) || self.jitter_scale < 0.0 {
            return Err("dropout must be in [0, 1), jitter probability in [0, 1], jitter scale at least 0".into());
        }
        Ok(())
    }

    /// Name and kind of every weight, in the order in which all lists of weights run.
    pub fn layout(&self) -> Vec<(String, Kind)> {
        let (d, h) = (self.dim, self.hidden);
        let mut list = vec![
            ("col".to_owned(), Kind::Position { rows: self.grid[1], cols: d / 2 }),
            ("row".to_owned(), Kind::Position { rows: self.grid[0], cols: d / 2 }),
        ];
        let linear = |list: &mut Vec<(String, Kind)>, name: String, inputs: usize, outputs: usize| {
            list.push((format!("{name}.weight"), Kind::Linear { inputs, outputs }));
            list.push((format!("{name}.bias"), Kind::Bias { size: outputs }));
        };
        let norm = |list: &mut Vec<(String, Kind)>, name: String| {
            list.push((format!("{name}.weight"), Kind::NormScale { size: d }));
            list.push((format!("{name}.bias"), Kind::Bias { size: d }));
        };
        linear(&mut list, "inp".into(), self.channels, d);
        for layer in 0..self.encoder_layers {
            let p = format!("encoder.{layer}");
            for part in ["q", "k", "v", "o"] {
                linear(&mut list, format!("{p}.attn.{part}"), d, d);
            }
            linear(&mut list, format!("{p}.ffn.up"), d, h);
            linear(&mut list, format!("{p}.ffn.down"), h, d);
            norm(&mut list, format!("{p}.norm1"));
            norm(&mut list, format!("{p}.norm2"));
        }
        for layer in 0..self.decoder_layers {
            let p = format!("decoder.{layer}");
            if layer == 0 || self.layerwise_query {
                list.push((format!("{p}.query"), Kind::Query { rows: self.tokens(), cols: d }));
            }
            for attention in ["attn1", "attn2"] {
                for part in ["q", "k", "v", "o"] {
                    linear(&mut list, format!("{p}.{attention}.{part}"), d, d);
                }
            }
            linear(&mut list, format!("{p}.ffn.up"), d, h);
            linear(&mut list, format!("{p}.ffn.down"), h, d);
            for n in ["norm1", "norm2", "norm3"] {
                norm(&mut list, format!("{p}.{n}"));
            }
        }
        norm(&mut list, "norm".into());
        linear(&mut list, "out".into(), d, self.channels);
        list
    }
}

/// What a weight is, which decides its shape and its initial values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linear weight, kept as `[inputs, outputs]`; Xavier-uniform.
    Linear {
        /// Rows.
        inputs: usize,
        /// Columns.
        outputs: usize,
    },
    /// Kept as `[1, size]`; zero.
    Bias {
        /// Length.
        size: usize,
    },
    /// Kept as `[1, size]`; one.
    NormScale {
        /// Length.
        size: usize,
    },
    /// Learned query `[tokens, dim]`; N(0, 1).
    Query {
        /// Tokens.
        rows: usize,
        /// Width.
        cols: usize,
    },
    /// Learned position table; U(0, 1).
    Position {
        /// Places along the axis.
        rows: usize,
        /// Half the width.
        cols: usize,
    },
}

impl Kind {
    /// Shape as kept.
    pub fn shape(self) -> [usize; 2] {
        match self {
            Self::Linear { inputs, outputs } => [inputs, outputs],
            Self::Bias { size } | Self::NormScale { size } => [1, size],
            Self::Query { rows, cols } | Self::Position { rows, cols } => [rows, cols],
        }
    }

    /// Shape in published files: linear weights `[out, in]`, vectors one-dimensional.
    pub fn published_shape(self) -> Vec<usize> {
        match self {
            Self::Linear { inputs, outputs } => vec![outputs, inputs],
            Self::Bias { size } | Self::NormScale { size } => vec![size],
            Self::Query { rows, cols } | Self::Position { rows, cols } => vec![rows, cols],
        }
    }
}

/// All weights of a model, in the order of [`UniadConfig::layout`].
#[derive(Clone, Debug)]
pub struct Weights {
    /// Names and kinds.
    pub layout: Vec<(String, Kind)>,
    /// One matrix each, of [`Kind::shape`].
    pub values: Vec<Tensor<2>>,
    index: BTreeMap<String, usize>,
}

impl Weights {
    /// Weights from a list in layout order.
    pub fn new(layout: Vec<(String, Kind)>, values: Vec<Tensor<2>>) -> Self {
        debug_assert_eq!(layout.len(), values.len());
        let index = layout.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
        Self { layout, values, index }
    }

    /// Initial weights as the paper's code draws them, from a seed; the same on every device.
    pub fn init(config: &UniadConfig, seed: u64, device: &Device) -> Self {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
        let layout = config.layout();
        let values = layout
            .iter()
            .map(|(_, kind)| {
                let [rows, cols] = kind.shape();
                let n = rows * cols;
                let data: Vec<f32> = match kind {
                    Kind::Linear { inputs, outputs } => {
                        let limit = (6.0 / (*inputs + *outputs) as f32).sqrt();
                        (0..n).map(|_| rng.random_range(-limit..limit)).collect()
                    }
                    Kind::Bias { .. } => vec![0.0; n],
                    Kind::NormScale { .. } => vec![1.0; n],
                    Kind::Query { .. } => (0..n).map(|_| normal(&mut rng)).collect(),
                    Kind::Position { .. } => (0..n).map(|_| rng.random_range(0.0..1.0)).collect(),
                };
                Tensor::from_data(TensorData::new(data, [rows, cols]), device)
            })
            .collect();
        Self::new(layout, values)
    }

    /// Weights from named published tensors (`[out, in]` linears); every name of the layout must be there with its shape.
    ///
    /// # Errors
    /// One sentence naming the tensor that is missing or has another shape.
    pub fn from_published(
        config: &UniadConfig,
        mut get: impl FnMut(&str) -> Option<(Vec<usize>, Vec<f32>)>,
        device: &Device,
    ) -> Result<Self, String> {
        let layout = config.layout();
        let mut values = Vec::with_capacity(layout.len());
        for (name, kind) in &layout {
            let (shape, data) = get(name).ok_or_else(|| format!("weight {name} is missing"))?;
            let wanted = kind.published_shape();
            if shape != wanted {
                return Err(format!("weight {name} has shape {shape:?}, expected {wanted:?}"));
            }
            let kept = kind.shape();
            values.push(match kind {
                Kind::Linear { inputs, outputs } => Tensor::<2>::from_data(TensorData::new(data, [*outputs, *inputs]), device).transpose(),
                _ => Tensor::from_data(TensorData::new(data, kept), device),
            });
        }
        Ok(Self::new(layout, values))
    }

    /// Host copies in published shapes, in layout order.
    pub fn to_published(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        self.layout
            .iter()
            .zip(&self.values)
            .map(|((name, kind), value)| {
                let value = value.clone().inner_if_needed();
                let value = if matches!(kind, Kind::Linear { .. }) { value.transpose() } else { value };
                (name.clone(), kind.published_shape(), host(value))
            })
            .collect()
    }

    /// The same weights as fresh leaves that gather gradients. `device` must be an autodiff device.
    pub fn as_leaves(&self) -> Self {
        let values = self.values.iter().map(|v| v.clone().inner_if_needed().autodiff_leaf()).collect();
        Self { layout: self.layout.clone(), values, index: self.index.clone() }
    }

    fn get(&self, name: &str) -> Tensor<2> {
        // Names come from the same layout as the list; a miss is a bug in this file, not bad input.
        let at = self.index.get(name).unwrap_or_else(|| panic!("no weight named {name}"));
        self.values[*at].clone()
    }

    fn row(&self, name: &str) -> Tensor<1> {
        let t = self.get(name);
        let n = t.dims()[1];
        t.reshape([n])
    }

    fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }
}

fn normal(rng: &mut rand_pcg::Pcg64) -> f32 {
    use rand::Rng;
    // Box-Muller on (0, 1]: one sample of two is enough here, this runs once per model.
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// Values of a tensor on the host, row-major.
pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec::<f32>().unwrap_or_default()
}

/// Moving between plain and autodiff tensors.
pub trait Leaf {
    /// Without the autodiff part, if there is one.
    fn inner_if_needed(self) -> Self;
    /// As a fresh leaf that gathers gradients.
    fn autodiff_leaf(self) -> Self;
}

impl<const D: usize> Leaf for Tensor<D> {
    fn inner_if_needed(self) -> Self {
        if self.is_autodiff() { self.inner() } else { self }
    }
    fn autodiff_leaf(self) -> Self {
        self.autodiff().require_grad()
    }
}

/// `[tokens, tokens]`, 1 where the pair is forbidden: |row difference| and |column difference| both at most `size / 2`, itself included.
pub fn neighbour_mask(grid: [usize; 2], size: usize) -> Vec<f32> {
    let [rows, cols] = grid;
    let reach = size / 2;
    let tokens = rows * cols;
    let mut mask = vec![0.0; tokens * tokens];
    if size == 0 {
        return mask;
    }
    for (i, line) in mask.chunks_exact_mut(tokens).enumerate() {
        for (j, cell) in line.iter_mut().enumerate() {
            if (i / cols).abs_diff(j / cols) <= reach && (i % cols).abs_diff(j % cols) <= reach {
                *cell = 1.0;
            }
        }
    }
    mask
}

/// A model ready to run on one device: configuration and masks; weights are passed in.
pub struct Uniad {
    /// Size and components.
    pub config: UniadConfig,
    masks: [Option<Tensor<4>>; 3],
}

impl Uniad {
    /// Masks are made once, on `device` (autodiff or not as the weights will be).
    pub fn new(config: UniadConfig, device: &Device) -> Self {
        let t = config.tokens();
        let mask = |size: usize| {
            (size > 0).then(|| {
                let data: Vec<f32> = neighbour_mask(config.grid, size).into_iter().map(|m| m * FORBIDDEN).collect();
                Tensor::<4>::from_data(TensorData::new(data, [1, 1, t, t]), device)
            })
        };
        let masks = [mask(config.mask.encoder), mask(config.mask.decoder_memory), mask(config.mask.decoder_previous)];
        Self { config, masks }
    }

    /// Position embedding `[tokens, dim]`: per token `[column half | row half]`.
    fn position(&self, w: &Weights) -> Tensor<2> {
        let [rows, cols] = self.config.grid;
        let half = self.config.dim / 2;
        let col: Tensor<3> = w.get("col").reshape([1, cols, half]).repeat_dim(0, rows);
        let row: Tensor<3> = w.get("row").reshape([rows, 1, half]).repeat_dim(1, cols);
        Tensor::cat(vec![col, row], 2).reshape([rows * cols, self.config.dim])
    }

    /// Reconstruction `[batch, tokens, channels]` of `tokens` of the same shape. `training` switches dropout on.
    pub fn forward(&self, w: &Weights, tokens: Tensor<3>, training: bool) -> Tensor<3> {
        let c = &self.config;
        let [batch, t, channels] = tokens.dims();
        let position = self.position(w);
        let flat = tokens.reshape([batch * t, channels]);
        let mut x = linear(w, "inp", flat);
        let over = |pos: &Tensor<2>| -> Tensor<3> { pos.clone().reshape([1, t, c.dim]) };
        let plus_position = |x: &Tensor<2>, rows: usize| -> Tensor<2> {
            (x.clone().reshape([rows, t, c.dim]) + over(&position)).reshape([rows * t, c.dim])
        };
        for layer in 0..c.encoder_layers {
            let p = format!("encoder.{layer}");
            let with_position = plus_position(&x, batch);
            let a = self.attention(w, &format!("{p}.attn"), (with_position.clone(), batch), with_position, x.clone(), batch, 0, training);
            x = norm(w, &format!("{p}.norm1"), x + self.drop(a, training));
            let f = self.feed_forward(w, &p, x.clone(), training);
            x = norm(w, &format!("{p}.norm2"), x + self.drop(f, training));
        }
        let memory = x;
        let memory_with_position = plus_position(&memory, batch);
        let mut out = memory.clone();
        for layer in 0..c.decoder_layers {
            let p = format!("decoder.{layer}");
            let query_name = format!("{p}.query");
            // The learned query is the same for every sample: its projection is computed once and broadcast.
            let (query, query_rows) = if w.has(&query_name) { (w.get(&query_name), 1) } else { (out.clone(), batch) };
            let query_with_position = plus_position(&query, query_rows);
            let a = self.attention(
                w,
                &format!("{p}.attn1"),
                (query_with_position, query_rows),
                memory_with_position.clone(),
                memory.clone(),
                batch,
                1,
                training,
            );
            let a = self.drop(a, training).reshape([batch, t, c.dim]) + query.reshape([query_rows, t, c.dim]);
            let mut y = norm(w, &format!("{p}.norm1"), a.reshape([batch * t, c.dim]));
            let a = self.attention(
                w,
                &format!("{p}.attn2"),
                (plus_position(&y, batch), batch),
                plus_position(&out, batch),
                out.clone(),
                batch,
                2,
                training,
            );
            y = norm(w, &format!("{p}.norm2"), y + self.drop(a, training));
            let f = self.feed_forward(w, &p, y.clone(), training);
            out = norm(w, &format!("{p}.norm3"), y + self.drop(f, training));
        }
        let out = norm(w, "norm", out);
        linear(w, "out", out).reshape([batch, t, channels])
    }

    /// Multi-head attention. `query` is `[rows * tokens, dim]` with its number of batch rows (1 broadcasts); keys and values `[batch * tokens, dim]`.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        w: &Weights,
        name: &str,
        query: (Tensor<2>, usize),
        key: Tensor<2>,
        value: Tensor<2>,
        batch: usize,
        mask: usize,
        training: bool,
    ) -> Tensor<2> {
        let c = &self.config;
        let (t, heads, width) = (c.tokens(), c.heads, c.dim / c.heads);
        let split = |x: Tensor<2>, rows: usize| -> Tensor<4> { x.reshape([rows, t, heads, width]).swap_dims(1, 2) };
        let (query, query_rows) = query;
        let q = split(linear(w, &format!("{name}.q"), query), query_rows).mul_scalar(1.0 / (width as f32).sqrt());
        let k = split(linear(w, &format!("{name}.k"), key), batch);
        let v = split(linear(w, &format!("{name}.v"), value), batch);
        let mut scores = q.matmul(k.swap_dims(2, 3));
        if let Some(mask) = self.masks.get(mask).and_then(Option::as_ref) {
            scores = scores + mask.clone();
        }
        let weights = self.drop(activation::softmax(scores, 3), training);
        let mixed = weights.matmul(v).swap_dims(1, 2).reshape([batch * t, c.dim]);
        linear(w, &format!("{name}.o"), mixed)
    }

    fn feed_forward(&self, w: &Weights, prefix: &str, x: Tensor<2>, training: bool) -> Tensor<2> {
        let up = activation::relu(linear(w, &format!("{prefix}.ffn.up"), x));
        linear(w, &format!("{prefix}.ffn.down"), self.drop(up, training))
    }

    fn drop<const D: usize>(&self, x: Tensor<D>, training: bool) -> Tensor<D> {
        let p = self.config.dropout;
        if !training || p == 0.0 {
            return x;
        }
        let keep = x.random_like(Distribution::Bernoulli(1.0 - p));
        x * keep.mul_scalar(1.0 / (1.0 - p))
    }

    /// Feature jittering (paper, section 3.4): tokens + N(0, 1) * (||token||_2 / channels) * scale, on a share of the samples.
    pub fn jitter(&self, tokens: Tensor<3>) -> Tensor<3> {
        let c = &self.config;
        if c.jitter_scale == 0.0 || c.jitter_probability == 0.0 {
            return tokens;
        }
        let [batch, t, channels] = tokens.dims();
        let size = tokens.clone().powi_scalar(2).sum_dim(2).sqrt().mul_scalar(c.jitter_scale / channels as f64);
        let noise = Tensor::<3>::random([batch, t, channels], Distribution::Normal(0.0, 1.0), &tokens.device()) * size;
        let noise = if c.jitter_probability < 1.0 {
            noise * Tensor::<3>::random([batch, 1, 1], Distribution::Bernoulli(c.jitter_probability), &tokens.device())
        } else {
            noise
        };
        tokens + noise
    }
}

/// Mean squared error over all elements (the paper's loss).
pub fn mse(reconstruction: Tensor<3>, features: Tensor<3>) -> Tensor<1> {
    (reconstruction - features).powi_scalar(2).mean()
}

/// Anomaly map on the grid, `[batch, tokens]`: L2 norm over channels of (reconstruction - features).
pub fn residual_norm(reconstruction: Tensor<3>, features: Tensor<3>) -> Tensor<2> {
    let [batch, t, _] = features.dims();
    (reconstruction - features).powi_scalar(2).sum_dim(2).sqrt().reshape([batch, t])
}

fn linear(w: &Weights, name: &str, x: Tensor<2>) -> Tensor<2> {
    x.matmul(w.get(&format!("{name}.weight"))) + w.get(&format!("{name}.bias"))
}

fn norm(w: &Weights, name: &str, x: Tensor<2>) -> Tensor<2> {
    module::layer_norm(x, w.row(&format!("{name}.weight")), Some(w.row(&format!("{name}.bias"))), NORM_EPSILON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_hides_a_square_and_no_more() {
        let mask = neighbour_mask([14, 14], 7);
        // An inner token: 7 x 7 hidden. A corner: 4 x 4.
        let hidden = |i: usize| mask[i * 196..(i + 1) * 196].iter().sum::<f32>();
        assert_eq!(hidden(7 * 14 + 7), 49.0);
        assert_eq!(hidden(0), 16.0);
        assert_eq!(neighbour_mask([3, 3], 0), vec![0.0; 81]);
    }

    #[test]
    fn sizes_that_cannot_work_are_named() {
        let mut config = UniadConfig::paper(272);
        assert_eq!(config.check(), Ok(()));
        config.mask.encoder = 6;
        assert!(config.check().unwrap_err().contains("encoder"));
        config = UniadConfig::paper(272);
        config.heads = 7;
        assert!(config.check().unwrap_err().contains("heads"));
    }

    #[test]
    fn the_paper_model_has_its_published_size() {
        let count: usize = UniadConfig::paper(272).layout().iter().map(|(_, k)| k.shape().iter().product::<usize>()).sum();
        // DESIGN.md: 7.72 M parameters in the transformer.
        assert!((7_700_000..7_740_000).contains(&count), "{count}");
    }
}
