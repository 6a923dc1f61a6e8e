//! Modes of normality: what `--preset fast` fits instead of training by gradient.
//!
//! Normal pictures fall into clusters (products, and variants of a product) without being told: *groups*. A group is divided into *modes* (poses of a
//! part, say) as far as that makes pictures that the fit has not seen more likely. A mode is a Gaussian per grid location with the location's own
//! mean and the covariance of its group (De Maesschalck et al. 2000 for the Mahalanobis distance; PaDiM, Defard et al. 2021, for its use on
//! pretrained features). A picture is gated to its mode by its mean features, every location gets the Mahalanobis distance to that mode, and the
//! distances of every group are brought to one scale by *cross-fitting*: the pictures are scored by models that have not seen them, fold by fold, so
//! that all training pictures calibrate and none has to be held out.
//!
//! Knows features, arithmetic and the score rule; no files, no graphs, no class labels.

use crate::train::{FeatureSet, whitening};
use crate::uniad::host;
use burn::tensor::{Device, Tensor, TensorData};
use cull::anomaly::{AnomalyMap, ScoreRule, Scorer};
use rand::{Rng, SeedableRng};

/// Why modes cannot be fitted.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModesError {
    /// Too few pictures.
    #[error("{found} normal images are too few to fit and calibrate, at least {needed} are needed: collect more good parts")]
    TooFew {
        /// Images there.
        found: usize,
        /// Images needed.
        needed: usize,
    },
    /// The covariance has no inverse although it was regularised.
    #[error(
        "the features of group {group} are degenerate (all pictures alike, or values that are not finite): check the pictures and the backbone"
    )]
    Degenerate {
        /// Group.
        group: usize,
    },
}

/// Settings of a fit. See EXPERIMENTS.md for what each was measured to bring.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct ModesConfig {
    /// Up to `few_groups` groups, a group is made for each so many pictures: too few groups join products, which costs most.
    pub images_per_group: usize,
    /// See `images_per_group`.
    pub few_groups: usize,
    /// Beyond `few_groups`, a group is made for each so many pictures: a group of many pictures is known better.
    pub images_per_further_group: usize,
    /// Most groups; each costs `channels^2` multiply-adds a location.
    pub most: usize,
    /// A division of a group into modes is tried where each gets at least this many pictures on average.
    pub images_per_mode: usize,
    /// A group's covariance is mixed with that of all groups, as if that many pictures of the others belonged to it.
    pub borrowed_images: f32,
    /// Added to the diagonal of a covariance, as a share of its mean.
    pub ridge: f32,
    /// Folds of the cross-fit.
    pub folds: usize,
    /// A group's spread of scores is mixed with that of all groups, as if that many pictures of the others belonged to it.
    pub borrowed_scores: f32,
    /// How a map becomes a score; the groups' scales are set by it.
    pub score: ScoreRule,
    /// What is usual at a location is mixed with what is usual at all of them, as if that many pictures had been alike everywhere.
    pub borrowed_usual: f32,
    /// Seed of the clustering.
    pub seed: u64,
}

impl Default for ModesConfig {
    fn default() -> Self {
        Self {
            images_per_group: 40,
            few_groups: 16,
            images_per_further_group: 110,
            most: 48,
            images_per_mode: 16,
            borrowed_images: 8.0,
            ridge: 0.005,
            folds: 5,
            borrowed_scores: 10.0,
            borrowed_usual: 100.0,
            score: ScoreRule::PAPER,
            seed: 1,
        }
    }
}

/// A fitted model; every matrix is row-major.
#[derive(Clone, Debug)]
pub struct Modes {
    /// Modes.
    pub count: usize,
    /// Group of every mode, `[count]`, from 0 up and never falling: the modes of a group stand together.
    pub group_of: Vec<usize>,
    /// Grid locations.
    pub tokens: usize,
    /// Feature channels.
    pub channels: usize,
    /// Features are standardised as `(feature - mean) * scale`, per channel.
    pub mean: Vec<f32>,
    /// See `mean`.
    pub scale: Vec<f32>,
    /// Gate: logits of a picture's group from its mean standardised features, `[channels, groups]`.
    pub group_weight: Vec<f32>,
    /// `[groups]`.
    pub group_bias: Vec<f32>,
    /// Logits of its mode within a group, above that of the group's first mode, from the same: `[channels, count]`.
    pub mode_weight: Vec<f32>,
    /// `[count]`.
    pub mode_bias: Vec<f32>,
    /// Per group, standardised features to coordinates in which the distance is Euclidean: `[groups][channels, channels]`.
    pub whiten: Vec<f32>,
    /// Per mode the expected coordinates of each location: `[count][tokens, channels]`.
    pub expected: Vec<f32>,
    /// The squared distance `d` of a location to a mode becomes `(d - offset) * gain`: `[tokens, count]`.
    pub offset: Vec<f32>,
    /// See `offset`; above zero.
    pub gain: Vec<f32>,
}

/// A fit with what the cross-fit says about it.
pub struct Fitted {
    /// The model, from all pictures.
    pub modes: Modes,
    /// Mode of every picture.
    pub mode_of: Vec<usize>,
    /// Score of every picture by a model that has not seen it, on the common scale.
    pub scores: Vec<f32>,
}

/// Fewest pictures that can be fitted and calibrated.
pub const MIN_PICTURES: usize = 20;
/// A cluster of fewer pictures is dissolved: every fold must leave some to fit.
const MIN_CLUSTER: usize = 8;
/// Independent starts of the clustering; the tightest result counts.
const CLUSTER_STARTS: usize = 10;
/// Rounds of Lloyd's algorithm; it has always settled long before.
const CLUSTER_ROUNDS: usize = 100;
/// Sharpness of the gate: the logit that a picture at a mode's mean squared radius loses for each further such radius.
const GATE_SHARPNESS: f64 = 8.0;
/// Largest logit of a mode above or below its group's first one. A picture of another group may be far from all modes of this one: the sum of
/// exponentials must stay finite there, whatever they are.
pub const MODE_LOGIT: f32 = 60.0;
/// Weights of the gate are lowered by this, and what is below it is 0: a picture of one mode then has nothing of the others.
pub const CLOSED: f32 = 1e-6;
/// Pictures whitened at a time; only memory and speed depend on it.
const CHUNK: usize = 32;

impl Modes {
    /// Groups.
    pub fn groups(&self) -> usize {
        self.group_of.last().map_or(0, |last| last + 1)
    }

    /// Mode weights of a picture, `[count]`: softmax over the groups times softmax over the modes of each; `features` is `[tokens, channels]`, not standardised.
    pub fn gate(&self, features: &[f32]) -> Vec<f32> {
        let descriptor = descriptor(features, &self.mean, &self.scale);
        let linear = |weight: &[f32], bias: &[f32]| {
            let mut logits = bias.to_vec();
            for (value, row) in descriptor.iter().zip(weight.chunks_exact(bias.len().max(1))) {
                for (logit, w) in logits.iter_mut().zip(row) {
                    *logit += value * w;
                }
            }
            logits
        };
        let mut groups = linear(&self.group_weight, &self.group_bias);
        let highest = groups.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        groups.iter_mut().for_each(|logit| *logit = (*logit - highest).exp());
        let all: f32 = groups.iter().sum();
        let modes: Vec<f32> =
            linear(&self.mode_weight, &self.mode_bias).into_iter().map(|logit| logit.clamp(-MODE_LOGIT, MODE_LOGIT).exp()).collect();
        let mut within = vec![0.0; groups.len()];
        for (mode, &group) in modes.iter().zip(&self.group_of) {
            within[group] += mode;
        }
        let open = |weight: f32| (weight - CLOSED).max(0.0);
        groups.iter_mut().for_each(|group| *group = open(*group / all));
        let all: f32 = groups.iter().sum();
        modes.iter().zip(&self.group_of).map(|(mode, &group)| open(mode / within[group]) * groups[group] / all).collect()
    }

    /// Anomaly maps of a set, `[tokens]` a picture: what the exported graph computes. `device` is where the products are computed.
    pub fn maps(&self, set: &FeatureSet, device: &Device) -> Vec<Vec<f32>> {
        let mut maps = vec![Vec::new(); set.len()];
        let gates: Vec<Vec<f32>> = (0..set.len()).map(|i| self.gate(set.sample(i))).collect();
        // Pictures of one mode have everything in common, and nearly all are; those between modes have a mixture of their own.
        let mut alike: Vec<(Vec<f32>, Vec<usize>)> = Vec::new();
        for (i, gate) in gates.into_iter().enumerate() {
            match alike.iter_mut().find(|(known, _)| *known == gate) {
                Some((_, pictures)) => pictures.push(i),
                None => alike.push((gate, vec![i])),
            }
        }
        for (gate, pictures) in alike {
            let mut of_groups = vec![0.0f32; self.groups()];
            gate.iter().zip(&self.group_of).for_each(|(w, &group)| of_groups[group] += w);
            let whiten = mixture(&of_groups, &self.whiten);
            let expected = mixture(&gate, &self.expected);
            let at_tokens = |values: &[f32]| -> Vec<f32> {
                values.chunks_exact(self.count.max(1)).map(|row| row.iter().zip(&gate).map(|(v, w)| v * w).sum()).collect()
            };
            let (offset, gain) = (at_tokens(&self.offset), at_tokens(&self.gain));
            let whitener = Whitener::new((&self.mean, &self.scale), self.tokens, &whiten, device);
            for part in pictures.chunks(CHUNK) {
                let distances = whitener.distances(set, part, &expected);
                for (&i, row) in part.iter().zip(distances.chunks_exact(self.tokens)) {
                    maps[i] = row.iter().zip(&offset).zip(&gain).map(|((d, offset), gain)| (d - offset) * gain).collect();
                }
            }
        }
        maps
    }
}

/// The sum of `weights.len()` equally long parts of `values`, each times its weight.
fn mixture(weights: &[f32], values: &[f32]) -> Vec<f32> {
    let len = values.len() / weights.len().max(1);
    let mut sum = vec![0.0; len];
    for (weight, part) in weights.iter().zip(values.chunks_exact(len.max(1))).filter(|(weight, _)| **weight > 0.0) {
        sum.iter_mut().zip(part).for_each(|(s, v)| *s += weight * v);
    }
    sum
}

/// Squared distances under one group's covariance.
struct Whitener<'a> {
    mean: &'a [f32],
    scale: &'a [f32],
    channels: usize,
    tokens: usize,
    whiten: Tensor<2>,
    device: &'a Device,
}

impl<'a> Whitener<'a> {
    /// `standard` is mean and scale per channel.
    fn new(standard: (&'a [f32], &'a [f32]), tokens: usize, whiten: &[f32], device: &'a Device) -> Self {
        let channels = standard.0.len();
        let whiten = Tensor::from_data(TensorData::new(whiten.to_vec(), [channels, channels]), device);
        Self { mean: standard.0, scale: standard.1, channels, tokens, whiten, device }
    }

    /// `[pictures, tokens]`.
    fn distances(&self, set: &FeatureSet, pictures: &[usize], expected: &[f32]) -> Vec<f32> {
        let rows = pictures.len() * self.tokens;
        let mut data = Vec::with_capacity(rows * self.channels);
        for &i in pictures {
            standardised(set.sample(i), self.mean, self.scale, &mut data);
        }
        let x: Tensor<2> = Tensor::from_data(TensorData::new(data, [rows, self.channels]), self.device);
        let z = host(x.matmul(self.whiten.clone()));
        z.chunks_exact(self.tokens * self.channels)
            .flat_map(|picture| {
                picture
                    .chunks_exact(self.channels)
                    .zip(expected.chunks_exact(self.channels))
                    .map(|(z, e)| z.iter().zip(e).map(|(z, e)| (z - e) * (z - e)).sum::<f32>())
            })
            .collect()
    }
}

/// Append the standardised features of a picture to `out`.
fn standardised(features: &[f32], mean: &[f32], scale: &[f32], out: &mut Vec<f32>) {
    for token in features.chunks_exact(mean.len().max(1)) {
        out.extend(token.iter().zip(mean).zip(scale).map(|((v, m), s)| (v - m) * s));
    }
}

/// Mean standardised features of a picture, `[channels]`.
fn descriptor(features: &[f32], mean: &[f32], scale: &[f32]) -> Vec<f32> {
    let channels = mean.len().max(1);
    let mut sum = vec![0f64; channels];
    for token in features.chunks_exact(channels) {
        for (s, v) in sum.iter_mut().zip(token) {
            *s += f64::from(*v);
        }
    }
    let n = (features.len() / channels).max(1) as f64;
    sum.iter().zip(mean).zip(scale).map(|((s, m), k)| ((s / n) as f32 - m) * k).collect()
}

/// Sums over some pictures of one mode, of features about the mode's centre; `[channels, channels]` and `[tokens, channels]`.
#[derive(Clone)]
struct Moments {
    pictures: f64,
    /// Sum of outer products over pictures and locations.
    second: Vec<f64>,
    /// Sum per location.
    location: Vec<f64>,
}

impl Moments {
    fn zero(tokens: usize, channels: usize) -> Self {
        Self { pictures: 0.0, second: vec![0.0; channels * channels], location: vec![0.0; tokens * channels] }
    }

    fn add(&mut self, other: &Self, sign: f64) {
        self.pictures += sign * other.pictures;
        for (a, b) in self.second.iter_mut().zip(&other.second) {
            *a += sign * b;
        }
        for (a, b) in self.location.iter_mut().zip(&other.location) {
            *a += sign * b;
        }
    }

    fn of(set: &FeatureSet, pictures: &[usize], standard: (&[f32], &[f32]), centre: &[f32], device: &Device) -> Self {
        let (tokens, channels) = (set.tokens, set.channels);
        let mut out = Self::zero(tokens, channels);
        out.pictures = pictures.len() as f64;
        for part in pictures.chunks(CHUNK) {
            let mut data = Vec::with_capacity(part.len() * tokens * channels);
            for &i in part {
                standardised(set.sample(i), standard.0, standard.1, &mut data);
            }
            for token in data.chunks_exact_mut(channels) {
                for (v, c) in token.iter_mut().zip(centre) {
                    *v -= c;
                }
            }
            for picture in data.chunks_exact(tokens * channels) {
                for (sum, v) in out.location.iter_mut().zip(picture) {
                    *sum += f64::from(*v);
                }
            }
            let rows = part.len() * tokens;
            let x: Tensor<2> = Tensor::from_data(TensorData::new(data, [rows, channels]), device);
            for (sum, v) in out.second.iter_mut().zip(host(x.clone().transpose().matmul(x))) {
                *sum += f64::from(v);
            }
        }
        out
    }

    /// Expected features of each location about the centre, `[tokens, channels]`, and the scatter about them, `[channels, channels]`, as a covariance.
    ///
    /// A location's mean is drawn to the mean of all locations as far as its own pictures cannot tell it from that (empirical Bayes, James and
    /// Stein 1961): a texture or a part in any pose ends with one mean, an aligned part with one each.
    fn gaussian(&self, tokens: usize, channels: usize, device: &Device) -> (Vec<f32>, Vec<f64>) {
        let (n, t) = (self.pictures.max(1.0), tokens as f64);
        let means: Vec<f64> = self.location.iter().map(|s| s / n).collect();
        let mut overall = vec![0.0; channels];
        let mut square = vec![0.0; channels];
        for row in means.chunks_exact(channels) {
            for ((o, q), m) in overall.iter_mut().zip(&mut square).zip(row) {
                *o += m / t;
                *q += m * m / t;
            }
        }
        let keep: Vec<f64> = (0..channels)
            .map(|c| {
                let between = square[c] - overall[c] * overall[c];
                let within = (self.second[c * channels + c] / t - n * square[c]).max(0.0) / (n - 1.0).max(1.0);
                if between > 0.0 { (1.0 - within / n / between).clamp(0.0, 1.0) } else { 0.0 }
            })
            .collect();
        let mut expected = Vec::with_capacity(tokens * channels);
        let mut off = Vec::with_capacity(tokens * channels);
        let mut raw = Vec::with_capacity(tokens * channels);
        for row in means.chunks_exact(channels) {
            for ((m, o), k) in row.iter().zip(&overall).zip(&keep) {
                let e = o + k * (m - o);
                expected.push(e as f32);
                off.push((m - e) as f32);
                raw.push(*m as f32);
            }
        }
        // Scatter about the expected values = second moment - n (sum of m m^T - sum of (m - e)(m - e)^T).
        let gram = |values: Vec<f32>| {
            let x: Tensor<2> = Tensor::from_data(TensorData::new(values, [tokens, channels]), device);
            host(x.clone().transpose().matmul(x))
        };
        let (raw, off) = (gram(raw), gram(off));
        let freedom = t * (n - 1.0).max(1.0);
        let covariance =
            self.second.iter().zip(raw.iter().zip(&off)).map(|(s, (m, o))| (s - n * (f64::from(*m) - f64::from(*o))) / freedom).collect();
        (expected, covariance)
    }
}

/// `w`, `[size, size]`, with `|x w|^2 = x^T covariance^-1 x` for row vectors `x`: the transposed inverse of the Cholesky factor. `None` when the
/// matrix is not positive definite.
fn whitening_of(covariance: &[f64], size: usize) -> Option<Vec<f32>> {
    // covariance = l l^T, l lower triangular, in place.
    let mut l = covariance.to_vec();
    for i in 0..size {
        for j in 0..=i {
            let (head, tail) = (&l[i * size..i * size + j], &l[j * size..j * size + j]);
            let dot: f64 = head.iter().zip(tail).map(|(a, b)| a * b).sum();
            let rest = l[i * size + j] - dot;
            l[i * size + j] = if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                rest.sqrt()
            } else {
                rest / l[j * size + j]
            };
        }
    }
    // Rows of `inverse` are columns of l^-1: w = (l^-1)^T, row c holds column c of l^-1.
    let mut w = vec![0f64; size * size];
    for c in 0..size {
        w[c * size + c] = 1.0 / l[c * size + c];
        for r in c + 1..size {
            let dot: f64 = l[r * size + c..r * size + r].iter().zip(&w[c * size + c..c * size + r]).map(|(a, b)| a * b).sum();
            w[c * size + r] = -dot / l[r * size + r];
        }
    }
    Some(w.into_iter().map(|v| v as f32).collect())
}

/// k-means (Lloyd 1982) from k-means++ seeds (Arthur and Vassilvitskii 2007), the tightest of [`CLUSTER_STARTS`] starts: the cluster of every point and the
/// centres. Clusters of fewer than [`MIN_CLUSTER`] points are dissolved. Fewer clusters than asked for may come out.
fn cluster(points: &[Vec<f32>], count: usize, seed: u64) -> (Vec<usize>, Vec<Vec<f32>>) {
    let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
    let mut best: Option<(f64, Vec<Vec<f32>>)> = None;
    for _ in 0..CLUSTER_STARTS {
        let mut centres = seeds(points, count.max(1), &mut rng);
        let mut of = assign(points, &centres);
        for _ in 0..CLUSTER_ROUNDS {
            centres = means(points, &of, &centres);
            let next = assign(points, &centres);
            if next == of {
                break;
            }
            of = next;
        }
        let spread = points.iter().zip(&of).map(|(p, &c)| squared(p, &centres[c])).sum::<f64>();
        if best.as_ref().is_none_or(|(least, _)| spread < *least) {
            best = Some((spread, centres));
        }
    }
    let mut centres = best.map(|(_, centres)| centres).unwrap_or_default();
    loop {
        let of = assign(points, &centres);
        let mut sizes = vec![0; centres.len()];
        for &c in &of {
            sizes[c] += 1;
        }
        let smallest = (0..centres.len()).min_by_key(|&c| sizes[c]);
        match smallest {
            Some(c) if sizes[c] < MIN_CLUSTER && centres.len() > 1 => {
                centres.remove(c);
            }
            _ => {
                let centres = means(points, &of, &centres);
                return (of, centres);
            }
        }
    }
}

fn squared(a: &[f32], b: &[f32]) -> f64 {
    f64::from(a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>())
}

fn assign(points: &[Vec<f32>], centres: &[Vec<f32>]) -> Vec<usize> {
    let nearest = |p: &Vec<f32>| {
        let distances = centres.iter().map(|c| squared(p, c)).enumerate();
        distances.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(index, _)| index)
    };
    points.iter().map(nearest).collect()
}

/// Mean of every cluster; a cluster that lost all its points keeps its centre.
fn means(points: &[Vec<f32>], of: &[usize], centres: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut sums: Vec<(f32, Vec<f32>)> = centres.iter().map(|c| (0.0, vec![0.0; c.len()])).collect();
    for (p, &c) in points.iter().zip(of) {
        let (n, sum) = &mut sums[c];
        *n += 1.0;
        for (s, v) in sum.iter_mut().zip(p) {
            *s += v;
        }
    }
    sums.into_iter()
        .zip(centres)
        .map(|((n, sum), old)| if n > 0.0 { sum.into_iter().map(|s| s / n).collect() } else { old.clone() })
        .collect()
}

fn seeds(points: &[Vec<f32>], count: usize, rng: &mut impl Rng) -> Vec<Vec<f32>> {
    let mut centres: Vec<Vec<f32>> = points.get(rng.random_range(0..points.len().max(1))).cloned().into_iter().collect();
    let mut nearest: Vec<f64> = points.iter().map(|_| f64::INFINITY).collect();
    while let (Some(last), true) = (centres.last(), centres.len() < count.min(points.len())) {
        for (d, p) in nearest.iter_mut().zip(points) {
            *d = d.min(squared(p, last));
        }
        let total: f64 = nearest.iter().sum();
        if total <= 0.0 {
            break;
        }
        let mut at = rng.random::<f64>() * total;
        let chosen = nearest.iter().position(|d| {
            at -= d;
            at < 0.0
        });
        match points.get(chosen.unwrap_or(points.len() - 1)) {
            Some(p) => centres.push(p.clone()),
            None => break,
        }
    }
    centres
}

/// How long a fit takes for each picture on this machine, in seconds, from the products that take nearly all of it.
pub fn seconds_a_picture(set: &FeatureSet, device: &Device) -> f64 {
    /// Products of that size for each picture: second moments, distances without the fold, and copying of as much.
    const PRODUCTS: f64 = 3.0;
    let all: Vec<usize> = (0..set.len().min(CHUNK)).collect();
    let (mean, scale) = (vec![0.0; set.channels], vec![1.0; set.channels]);
    let start = std::time::Instant::now();
    let moments = Moments::of(set, &all, (&mean, &scale), &mean, device);
    PRODUCTS * start.elapsed().as_secs_f64() / moments.pictures.max(1.0)
}

/// Contiguous fold of each of `count` pictures in their order. Neighbours on a line resemble each other: in runs, a fold's pictures are judged by
/// models that have seen neither them nor most of their neighbours.
fn folds(count: usize, folds: usize) -> Vec<usize> {
    (0..count).map(|i| i * folds.max(1) / count.max(1)).collect()
}

/// Groups for `pictures`.
fn group_count(config: &ModesConfig, pictures: usize) -> usize {
    let few = (pictures / config.images_per_group.max(1)).min(config.few_groups);
    few.max(pictures / config.images_per_further_group.max(1)).clamp(1, config.most.max(1))
}

/// Numbers of modes that are tried for a group besides one.
const TRIED: [usize; 5] = [2, 3, 4, 6, 8];

/// The pictures of a group, divided into modes, with their sums.
struct Group {
    /// All its pictures, in their order.
    members: Vec<usize>,
    /// About what the sums are taken.
    centre: Vec<f32>,
    /// Mean and scale per channel that the group's descriptors are standardised with to tell its modes.
    standard: (Vec<f32>, Vec<f32>),
    /// Per mode the mean of the descriptors so standardised.
    centres: Vec<Vec<f32>>,
    /// Per mode and fold the pictures and their sums: a model without a fold is then a subtraction.
    parts: Vec<Vec<(Vec<usize>, Moments)>>,
    /// Per mode the sums over all folds.
    whole: Vec<Moments>,
}

/// What a group's fit consists of.
struct Solution {
    /// `[channels, channels]`.
    whiten: Vec<f32>,
    /// Logarithm of the covariance's determinant.
    log_determinant: f64,
    /// Per mode the expected coordinates, `[tokens, channels]`.
    expected: Vec<Vec<f32>>,
}

/// What every step of a fit works on.
struct Work<'a> {
    set: &'a FeatureSet,
    standard: (&'a [f32], &'a [f32]),
    config: &'a ModesConfig,
    device: &'a Device,
}

impl Work<'_> {
    /// Divide `members` into modes by `mode_of` (one entry a member).
    fn group(&self, members: &[usize], centre: &[f32], standard: (Vec<f32>, Vec<f32>), mode_of: &[usize], centres: Vec<Vec<f32>>) -> Group {
        let fold_of = folds(members.len(), self.config.folds);
        let used = fold_of.last().map_or(0, |last| last + 1);
        let parts: Vec<Vec<(Vec<usize>, Moments)>> = (0..centres.len())
            .map(|mode| {
                (0..used)
                    .map(|fold| {
                        let of_part = members.iter().zip(mode_of).zip(&fold_of).filter(|((_, m), f)| **m == mode && **f == fold);
                        let chosen: Vec<usize> = of_part.map(|((&i, _), _)| i).collect();
                        let moments = Moments::of(self.set, &chosen, self.standard, centre, self.device);
                        (chosen, moments)
                    })
                    .collect()
            })
            .collect();
        let whole = parts
            .iter()
            .map(|folds| {
                let mut sum = Moments::zero(self.set.tokens, self.set.channels);
                folds.iter().for_each(|(_, moments)| sum.add(moments, 1.0));
                sum
            })
            .collect();
        Group { members: members.to_vec(), centre: centre.to_vec(), standard, centres, parts, whole }
    }

    /// The moments of every mode without a fold; a mode that has nothing else keeps it.
    fn without(&self, group: &Group, fold: usize) -> Vec<Moments> {
        group
            .whole
            .iter()
            .zip(&group.parts)
            .map(|(whole, folds)| {
                let mut rest = whole.clone();
                if let Some((_, moments)) = folds.get(fold) {
                    rest.add(moments, -1.0);
                }
                if rest.pictures > 1.0 { rest } else { whole.clone() }
            })
            .collect()
    }

    /// Expected features of each mode about the group's centre, and the covariance about them that the modes have in common.
    fn pooled(&self, of_mode: &[Moments]) -> (Vec<Vec<f32>>, Vec<f64>) {
        let (tokens, channels) = (self.set.tokens, self.set.channels);
        let freedom = |m: &Moments| (m.pictures - 1.0).max(1.0);
        let all: f64 = of_mode.iter().map(freedom).sum();
        let mut covariance = vec![0.0; channels * channels];
        let mut expected = Vec::with_capacity(of_mode.len());
        for moments in of_mode {
            let (e, of_this) = moments.gaussian(tokens, channels, self.device);
            for (c, s) in covariance.iter_mut().zip(of_this) {
                *c += s * freedom(moments) / all;
            }
            expected.push(e);
        }
        (expected, covariance)
    }

    /// Fit a group from its modes' moments; `shared` is the covariance to borrow from, and the group's number is for the error.
    fn solve(&self, number: usize, centre: &[f32], of_mode: &[Moments], shared: Option<&[f64]>) -> Result<Solution, ModesError> {
        let (tokens, channels) = (self.set.tokens, self.set.channels);
        let (mut expected, mut covariance) = self.pooled(of_mode);
        if let Some(shared) = shared {
            let pictures: f64 = of_mode.iter().map(|m| m.pictures).sum();
            let own = pictures / (pictures + f64::from(self.config.borrowed_images));
            for (c, s) in covariance.iter_mut().zip(shared) {
                *c = own * *c + (1.0 - own) * s;
            }
        }
        let trace: f64 = (0..channels).map(|c| covariance[c * channels + c]).sum();
        for c in 0..channels {
            covariance[c * channels + c] += f64::from(self.config.ridge) * trace / channels as f64;
        }
        let whiten = whitening_of(&covariance, channels).ok_or(ModesError::Degenerate { group: number })?;
        // The diagonal of the whitening is one over that of the Cholesky factor.
        let log_determinant = -2.0 * (0..channels).map(|c| f64::from(whiten[c * channels + c]).ln()).sum::<f64>();
        let w: Tensor<2> = Tensor::from_data(TensorData::new(whiten.clone(), [channels, channels]), self.device);
        for expected in &mut expected {
            for row in expected.chunks_exact_mut(channels) {
                for (e, c) in row.iter_mut().zip(centre) {
                    *e += c;
                }
            }
            let e: Tensor<2> = Tensor::from_data(TensorData::new(std::mem::take(expected), [tokens, channels]), self.device);
            *expected = host(e.matmul(w.clone()));
        }
        Ok(Solution { whiten, log_determinant, expected })
    }

    /// Squared distances of a group's pictures to their modes by fits without their folds: `seen` gets picture, distances and the fit's log determinant.
    fn cross_fit(
        &self,
        number: usize,
        group: &Group,
        shared: Option<&[f64]>,
        seen: &mut dyn FnMut(usize, &[f32], f64),
    ) -> Result<(), ModesError> {
        let used = group.parts.first().map_or(0, Vec::len);
        for fold in 0..used {
            let solution = self.solve(number, &group.centre, &self.without(group, fold), shared)?;
            let whitener = Whitener::new(self.standard, self.set.tokens, &solution.whiten, self.device);
            for (folds, expected) in group.parts.iter().zip(&solution.expected) {
                let Some((pictures, _)) = folds.get(fold) else { continue };
                for part in pictures.chunks(CHUNK) {
                    let distances = whitener.distances(self.set, part, expected);
                    for (&i, row) in part.iter().zip(distances.chunks_exact(self.set.tokens)) {
                        seen(i, row, solution.log_determinant);
                    }
                }
            }
        }
        Ok(())
    }

    /// Divide a group into as many modes as make its pictures most likely by fits that have not seen them.
    fn divide(&self, number: usize, members: &[usize], centre: &[f32], descriptors: &[Vec<f32>]) -> Group {
        // What cannot be fitted alone is not likely at all; whether it can with what it borrows is seen later.
        let surprise = |group: &Group| {
            let mut sum = 0.0;
            let fitted = self.cross_fit(number, group, None, &mut |_, distances, log_determinant| {
                sum += distances.iter().map(|d| f64::from(*d)).sum::<f64>() / self.set.tokens.max(1) as f64 + log_determinant;
            });
            if fitted.is_ok() && sum.is_finite() { sum } else { f64::INFINITY }
        };
        let own: Vec<&Vec<f32>> = members.iter().filter_map(|&i| descriptors.get(i)).collect();
        // Poses differ in what barely tells products apart: to find them, each channel counts by its spread within the group.
        let standard = spread_of(&own, self.set.channels);
        let points: Vec<Vec<f32>> = own.iter().map(|d| locally(d, &standard)).collect();
        let mut best = self.group(members, centre, standard.clone(), &vec![0; members.len()], vec![vec![0.0; self.set.channels]]);
        let tried: Vec<usize> = TRIED.into_iter().filter(|count| count * self.config.images_per_mode.max(1) <= members.len()).collect();
        if tried.is_empty() {
            return best;
        }
        let mut least = surprise(&best);
        for count in tried {
            let (mode_of, centres) = cluster(&points, count, self.config.seed);
            if centres.len() < count {
                continue;
            }
            let divided = self.group(members, centre, standard.clone(), &mode_of, centres);
            let found = surprise(&divided);
            if found < least {
                (least, best) = (found, divided);
            }
        }
        best
    }
}

/// Fit modes to normal pictures. `set` holds the features as the backbone gives them; `device` is where the products are computed (the CPU is right: a
/// fit takes seconds); `on_step` is called with the steps done and their number.
///
/// # Errors
/// Too few pictures, or features that do not vary.
pub fn fit(
    set: &FeatureSet,
    config: &ModesConfig,
    input_px: [usize; 2],
    device: &Device,
    on_step: &mut dyn FnMut(usize, usize),
) -> Result<Fitted, ModesError> {
    if set.len() < MIN_PICTURES {
        return Err(ModesError::TooFew { found: set.len(), needed: MIN_PICTURES });
    }
    let (tokens, channels) = (set.tokens, set.channels);
    let (mean, scale) = whitening(set);
    let standard = (mean.as_slice(), scale.as_slice());
    let descriptors: Vec<Vec<f32>> = (0..set.len()).map(|i| descriptor(set.sample(i), &mean, &scale)).collect();
    let (group_of, centres) = cluster(&descriptors, group_count(config, set.len()), config.seed);
    let work = Work { set, standard, config, device };
    // A group is divided, then cross-fitted.
    let steps = 2 * centres.len();
    let mut groups = Vec::with_capacity(centres.len());
    for (number, centre) in centres.iter().enumerate() {
        on_step(number, steps);
        let members: Vec<usize> = (0..set.len()).filter(|&i| group_of[i] == number).collect();
        groups.push(work.divide(number, &members, centre, &descriptors));
    }
    // What all groups share, for those with few pictures.
    let mut shared = vec![0.0; channels * channels];
    for group in &groups {
        let (_, covariance) = work.pooled(&group.whole);
        for (s, c) in shared.iter_mut().zip(covariance) {
            *s += c * group.members.len() as f64 / set.len() as f64;
        }
    }

    // Squared distances of every picture to its mode by a fit without its fold, `[pictures, tokens]`.
    let mut distances = vec![0.0f32; set.len() * tokens];
    let (mut whiten, mut expected) = (Vec::new(), Vec::new());
    for (number, group) in groups.iter().enumerate() {
        on_step(groups.len() + number, steps);
        work.cross_fit(number, group, Some(&shared), &mut |i, row, _| distances[i * tokens..(i + 1) * tokens].copy_from_slice(row))?;
        let solution = work.solve(number, &group.centre, &group.whole, Some(&shared))?;
        whiten.extend(solution.whiten);
        expected.extend(solution.expected.into_iter().flatten());
    }
    on_step(steps, steps);

    // What is usual at each location, once more without the picture's own fold.
    let row = |i: usize| &distances[i * tokens..(i + 1) * tokens];
    let mut scorer = Scorer::new(config.score, grid_of(tokens), input_px);
    let mut raw = vec![0.0f32; set.len()];
    let mut usual = Vec::with_capacity(groups.len());
    for group in &groups {
        let fold_of = folds(group.members.len(), config.folds);
        let used = fold_of.last().map_or(0, |last| last + 1);
        for fold in 0..used {
            let part = |inside: bool| -> Vec<usize> {
                group.members.iter().zip(&fold_of).filter(|(_, f)| (**f == fold) == inside).map(|(&i, _)| i).collect()
            };
            let others = part(false);
            let of = Usual::new(if others.len() > 1 { &others } else { &group.members }, &row, tokens, config.borrowed_usual);
            for i in part(true) {
                raw[i] = scorer.score(&map_of(&of.apply(row(i))));
            }
        }
        usual.push(Usual::new(&group.members, &row, tokens, config.borrowed_usual));
    }
    let members: Vec<&[usize]> = groups.iter().map(|group| group.members.as_slice()).collect();
    let (group_offset, group_gain) = common_scale(&raw, &members, config.borrowed_scores);
    let scores = raw.iter().zip(&group_of).map(|(s, &g)| (s - group_offset[g]) * group_gain[g]).collect();

    // The modes in a row, group after group.
    let mode_group: Vec<usize> = groups.iter().enumerate().flat_map(|(g, group)| group.centres.iter().map(move |_| g)).collect();
    let mut mode_of = vec![0; set.len()];
    for (mode, folds) in groups.iter().flat_map(|group| &group.parts).enumerate() {
        for &i in folds.iter().flat_map(|(pictures, _)| pictures) {
            mode_of[i] = mode;
        }
    }
    // ((d - mean) / deviation - offset) * gain, as one offset and one gain.
    let count = mode_group.len();
    let (mut offset, mut gain) = (vec![0.0; tokens * count], vec![0.0; tokens * count]);
    for (m, &g) in mode_group.iter().enumerate() {
        for (t, (mean, deviation)) in usual[g].mean.iter().zip(&usual[g].deviation).enumerate() {
            offset[t * count + m] = mean + group_offset[g] * deviation;
            gain[t * count + m] = group_gain[g] / deviation;
        }
    }
    let (group_weight, group_bias) = gate(&descriptors, &group_of, &centres);
    let (mode_weight, mode_bias) = mode_gate(&groups, &descriptors, &mode_of, channels);
    let modes = Modes {
        count,
        group_of: mode_group,
        tokens,
        channels,
        mean,
        scale,
        group_weight,
        group_bias,
        mode_weight,
        mode_bias,
        whiten,
        expected,
        offset,
        gain,
    };
    Ok(Fitted { modes, mode_of, scores })
}

/// Mean over the 3 x 3 neighbours of every location, edges repeated.
fn blurred(values: &[f64]) -> Vec<f64> {
    let [rows, cols] = grid_of(values.len());
    let near = |at: usize, size: usize| [at.saturating_sub(1), at, (at + 1).min(size.saturating_sub(1))];
    (0..rows)
        .flat_map(|r| (0..cols).map(move |c| (r, c)))
        .map(|(r, c)| {
            let cells = near(r, rows).into_iter().flat_map(|r| near(c, cols).map(|c| values.get(r * cols + c).copied().unwrap_or(0.0)));
            cells.sum::<f64>() / 9.0
        })
        .collect()
}

/// Distances that are usual at each location of a group: mean and standard deviation over its pictures and the location's neighbours, drawn to those of all
/// locations where the pictures are few. Edges of parts vary more than plain surfaces; without this they decide every score.
struct Usual {
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

impl Usual {
    fn new<'a>(pictures: &[usize], row: &dyn Fn(usize) -> &'a [f32], tokens: usize, borrowed: f32) -> Self {
        let n = pictures.len() as f64;
        let (mut sum, mut square) = (vec![0f64; tokens], vec![0f64; tokens]);
        for &i in pictures {
            for ((s, q), d) in sum.iter_mut().zip(&mut square).zip(row(i)) {
                *s += f64::from(*d);
                *q += f64::from(*d) * f64::from(*d);
            }
        }
        let mean: Vec<f64> = sum.iter().map(|s| s / n).collect();
        let variance: Vec<f64> = square.iter().zip(&mean).map(|(q, m)| ((q - n * m * m) / (n - 1.0).max(1.0)).max(0.0)).collect();
        let average = |values: &[f64]| values.iter().sum::<f64>() / tokens.max(1) as f64;
        let (mean, variance) = (blurred(&mean), blurred(&variance));
        let (all_mean, all_variance) = (average(&mean), average(&variance));
        let own = n / (n + f64::from(borrowed));
        let deviation = |v: &f64| (own * v + (1.0 - own) * all_variance).max(f64::from(f32::MIN_POSITIVE)).sqrt() as f32;
        Self {
            mean: mean.iter().map(|m| (own * m + (1.0 - own) * all_mean) as f32).collect(),
            deviation: variance.iter().map(deviation).collect(),
        }
    }

    fn apply(&self, distances: &[f32]) -> Vec<f32> {
        distances.iter().zip(&self.mean).zip(&self.deviation).map(|((d, m), s)| (d - m) / s).collect()
    }
}

/// Rows and columns of a square grid.
fn grid_of(tokens: usize) -> [usize; 2] {
    [tokens.isqrt(); 2]
}

fn map_of(values: &[f32]) -> AnomalyMap {
    let [rows, cols] = grid_of(values.len());
    AnomalyMap { grid_rows: rows, grid_cols: cols, values: values.to_vec() }
}

/// Logits linear in the descriptor whose softmax picks the nearest centre: `-sharpness * |d - c|^2 / radius^2` without its part that all modes share.
fn gate(descriptors: &[Vec<f32>], mode_of: &[usize], centres: &[Vec<f32>]) -> (Vec<f32>, Vec<f32>) {
    let spread: f64 = descriptors.iter().zip(mode_of).map(|(d, &m)| squared(d, &centres[m])).sum::<f64>() / descriptors.len().max(1) as f64;
    let sharpness = GATE_SHARPNESS / spread.max(f64::EPSILON);
    let channels = centres.first().map_or(0, Vec::len);
    let mut weight = Vec::with_capacity(channels * centres.len());
    for c in 0..channels {
        weight.extend(centres.iter().map(|centre| (2.0 * sharpness * f64::from(centre[c])) as f32));
    }
    let zero = vec![0.0; channels];
    let bias = centres.iter().map(|centre| (-sharpness * squared(centre, &zero)) as f32).collect();
    (weight, bias)
}

/// Mean per channel, and one over the deviation of those that vary (nought for the others).
fn spread_of(points: &[&Vec<f32>], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let n = points.len().max(1) as f64;
    let (mut sum, mut square) = (vec![0f64; channels], vec![0f64; channels]);
    for point in points {
        for ((s, q), v) in sum.iter_mut().zip(&mut square).zip(*point) {
            *s += f64::from(*v);
            *q += f64::from(*v) * f64::from(*v);
        }
    }
    let scale = sum.iter().zip(&square).map(|(s, q)| {
        let variance = q / n - (s / n) * (s / n);
        if variance > f64::from(f32::EPSILON) { variance.sqrt().recip() as f32 } else { 0.0 }
    });
    (sum.iter().map(|s| (s / n) as f32).collect(), scale.collect())
}

/// A descriptor in a group's own standard.
fn locally(descriptor: &[f32], (mean, scale): &(Vec<f32>, Vec<f32>)) -> Vec<f32> {
    descriptor.iter().zip(mean).zip(scale).map(|((v, m), s)| (v - m) * s).collect()
}

/// As [`gate`] within each group, in the group's own standard; every logit less that of the group's first mode. `[channels, modes]` and `[modes]`.
fn mode_gate(groups: &[Group], descriptors: &[Vec<f32>], mode_of: &[usize], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let count: usize = groups.iter().map(|group| group.centres.len()).sum();
    let (mut weight, mut bias) = (vec![0.0; channels * count], vec![0.0; count]);
    let mut first = 0;
    for group in groups {
        let modes = group.centres.len();
        let points: Vec<Vec<f32>> = group.members.iter().filter_map(|&i| descriptors.get(i)).map(|d| locally(d, &group.standard)).collect();
        let of: Vec<usize> = group.members.iter().filter_map(|&i| mode_of.get(i)).map(|mode| mode - first).collect();
        let (local_weight, local_bias) = gate(&points, &of, &group.centres);
        for m in 1..modes {
            let mut constant = f64::from(local_bias[m] - local_bias[0]);
            for c in 0..channels {
                let w = (local_weight[c * modes + m] - local_weight[c * modes]) * group.standard.1[c];
                weight[c * count + first + m] = w;
                constant -= f64::from(w) * f64::from(group.standard.0[c]);
            }
            bias[first + m] = constant as f32;
        }
        first += modes;
    }
    (weight, bias)
}

/// Offset and gain per group that give the scores of every group median 0 and mean excess 1 of the upper half over the median. The excess of a group
/// with few pictures is drawn to that of all groups.
fn common_scale(raw: &[f32], members: &[&[usize]], borrowed: f32) -> (Vec<f32>, Vec<f32>) {
    let of_group: Vec<(f64, f64, f64)> = members
        .iter()
        .map(|pictures| {
            let mut scores: Vec<f64> = pictures.iter().filter_map(|&i| raw.get(i)).map(|s| f64::from(*s)).collect();
            scores.sort_by(f64::total_cmp);
            let median = scores.get(scores.len() / 2).copied().unwrap_or(0.0);
            let upper = scores.get(scores.len() / 2..).unwrap_or(&[]);
            let excess = upper.iter().map(|s| s - median).sum::<f64>() / upper.len().max(1) as f64;
            (scores.len() as f64, median, excess)
        })
        .collect();
    let all: f64 = of_group.iter().map(|m| m.0).sum();
    let common = of_group.iter().map(|(n, _, spread)| n * spread).sum::<f64>() / all.max(1.0);
    of_group
        .iter()
        .map(|(n, median, spread)| {
            let own = n / (n + f64::from(borrowed));
            let spread = (own * spread + (1.0 - own) * common).max(1e-6);
            (*median as f32, (1.0 / spread) as f32)
        })
        .unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
        // Sum of uniforms: near enough to a Gaussian for these checks.
        (0..count).map(|_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0).collect()
    }

    /// Pictures of two products, `[2 * each, 16 tokens, 5 channels]`, alternating. Channel 4 is 0.05 of noise about the sum of channels 0 and 1.
    fn two_products(each: usize, seed: u64) -> FeatureSet {
        let (tokens, channels) = (16, 5);
        let mut values = random(2 * each * tokens * channels, seed);
        for (i, picture) in values.chunks_exact_mut(tokens * channels).enumerate() {
            for (t, token) in picture.chunks_exact_mut(channels).enumerate() {
                token[2] += if i % 2 == 0 { 8.0 } else { -8.0 };
                token[3] += t as f32;
                token[4] = token[0] + token[1] + 0.05 * token[4];
            }
        }
        FeatureSet { tokens, channels, values }
    }

    fn config() -> ModesConfig {
        ModesConfig { score: ScoreRule::TopMean { share: 0.1 }, ridge: 1e-4, ..ModesConfig::default() }
    }

    fn fitted(set: &FeatureSet) -> Fitted {
        fit(set, &config(), [16, 16], &Device::flex(), &mut |_, _| {}).unwrap()
    }

    #[test]
    fn whitening_is_the_inverse_of_the_covariance() {
        let size = 6;
        let x = random(40 * size, 3);
        let mut covariance = vec![0f64; size * size];
        for row in x.chunks_exact(size) {
            for (i, a) in row.iter().enumerate() {
                for (j, b) in row.iter().enumerate() {
                    covariance[i * size + j] += f64::from(a * b) / 40.0;
                }
            }
        }
        let w = whitening_of(&covariance, size).unwrap();
        // w^T covariance w = 1.
        for i in 0..size {
            for j in 0..size {
                let mut sum = 0.0;
                for a in 0..size {
                    for b in 0..size {
                        sum += f64::from(w[a * size + i]) * covariance[a * size + b] * f64::from(w[b * size + j]);
                    }
                }
                assert!((sum - if i == j { 1.0 } else { 0.0 }).abs() < 1e-4, "{i} {j} {sum}");
            }
        }
        assert!(whitening_of(&[1.0, 2.0, 2.0, 1.0], 2).is_none(), "not positive definite");
        assert!(whitening_of(&[f64::NAN], 1).is_none());
    }

    #[test]
    fn moments_without_a_fold_are_the_moments_of_the_rest() {
        let set = two_products(12, 5);
        let device = Device::flex();
        let (mean, scale) = (vec![0.0; 5], vec![1.0; 5]);
        let of = |pictures: &[usize]| Moments::of(&set, pictures, (&mean, &scale), &[0.5; 5], &device);
        let mut rest = of(&[0, 2, 4, 6, 8]);
        rest.add(&of(&[2, 8]), -1.0);
        let ((e, s), (e2, s2)) = (rest.gaussian(16, 5, &device), of(&[0, 4, 6]).gaussian(16, 5, &device));
        assert!(e.iter().zip(&e2).all(|(a, b)| (a - b).abs() < 1e-3));
        assert!(s.iter().zip(&s2).all(|(a, b)| (a - b).abs() < 1e-3), "{s:?} {s2:?}");
    }

    #[test]
    fn a_location_is_told_from_the_others_only_where_the_pictures_tell() {
        let set = two_products(40, 6);
        let device = Device::flex();
        let all: Vec<usize> = (0..80).step_by(2).collect();
        let moments = Moments::of(&set, &all, (&[0.0; 5], &[1.0; 5]), &[0.0; 5], &device);
        let (expected, covariance) = moments.gaussian(16, 5, &device);
        let spread = |c: usize| {
            let column: Vec<f32> = expected.iter().skip(c).step_by(5).copied().collect();
            column.iter().fold(f32::MIN, |a, b| a.max(*b)) - column.iter().fold(f32::MAX, |a, b| a.min(*b))
        };
        // Channel 3 rises by 15 over the locations; channel 0 does not depend on the location.
        assert!((spread(3) - 15.0).abs() < 1.0 && spread(0) < 0.5, "{} {}", spread(3), spread(0));
        assert!((covariance[3 * 5 + 3] - 1.0).abs() < 0.2, "the rise is no scatter: {}", covariance[18]);
    }

    #[test]
    fn clusters_are_found_without_labels_and_small_ones_dissolved() {
        let mut points: Vec<Vec<f32>> = random(120, 7).chunks_exact(2).map(<[f32]>::to_vec).collect();
        for (i, p) in points.iter_mut().enumerate() {
            p[0] += [0.0, 50.0, 100.0][i % 3];
        }
        points.push(vec![5000.0, 0.0]);
        let (of, centres) = cluster(&points, 4, 1);
        assert_eq!(centres.len(), 3, "one outlier is no mode");
        for (i, m) in of.iter().take(60).enumerate() {
            assert_eq!(*m, of[i % 3], "point {i}");
        }
        assert_eq!(cluster(&vec![vec![1.0; 3]; 30], 5, 1).1.len(), 1, "equal points are one cluster");
    }

    #[test]
    fn defects_stand_out_in_their_product_and_normal_pictures_are_calibrated() {
        let set = two_products(100, 8);
        let Fitted { modes, mode_of, scores } = fitted(&set);
        // Clusters may split a product, but never join two.
        for m in 0..modes.count {
            let products: std::collections::BTreeSet<usize> = (0..200).filter(|&i| mode_of[i] == m).map(|i| i % 2).collect();
            assert_eq!(products.len(), 1, "mode {m}");
        }
        // New normal pictures score as the cross-fitted ones do.
        let mut scorer = Scorer::new(config().score, [4, 4], [16, 16]);
        let new = two_products(100, 9);
        let found: Vec<f32> = modes.maps(&new, &Device::flex()).iter().map(|m| scorer.score(&map_of(m))).collect();
        let mut sorted = scores.clone();
        sorted.sort_by(f32::total_cmp);
        let limit = sorted[190];
        let above = found.iter().filter(|s| **s > limit).count();
        assert!((2..=24).contains(&above), "{above} of 200 above the 95 % quantile");
        // A break of the relation between channels, small in every channel alone, at one location.
        let mut bad = two_products(20, 10);
        for picture in bad.values.chunks_exact_mut(16 * 5) {
            picture[7 * 5 + 4] += 1.0;
        }
        let maps = modes.maps(&bad, &Device::flex());
        for map in &maps {
            assert!(map.iter().all(|v| *v <= map[7]), "the defect is where it was put");
            assert!(scorer.score(&map_of(map)) > sorted[199], "and no normal picture scores like it");
        }
    }

    #[test]
    fn a_group_is_divided_where_its_pictures_are_of_several_kinds_and_only_there() {
        // Poses: where channel 1 is high depends on the pose; channels 2 and 3 tell the pose in the mean, far less than the product.
        let poses = |each: usize, kinds: usize, seed: u64| {
            let mut set = two_products(each, seed);
            for (i, picture) in set.values.chunks_exact_mut(16 * 5).enumerate() {
                let pose = i / 2 % kinds;
                for (t, token) in picture.chunks_exact_mut(5).enumerate() {
                    token[2] += 2.0 * pose as f32;
                    token[3] += 2.0 * pose as f32;
                    token[1] += if t / 4 == pose { 6.0 } else { 0.0 };
                    token[4] += if t / 4 == pose { 6.0 } else { 0.0 };
                }
            }
            set
        };
        let two_groups = ModesConfig { few_groups: 2, ..config() };
        let fit = |set: &FeatureSet| fit(set, &two_groups, [16, 16], &Device::flex(), &mut |_, _| {}).unwrap();
        let plain = fit(&poses(120, 1, 20)).modes;
        assert_eq!((plain.count, plain.groups()), (2, 2), "nothing to divide");
        let Fitted { modes, mode_of, .. } = fit(&poses(120, 2, 21));
        assert_eq!((modes.count, modes.groups(), modes.group_of.as_slice()), (4, 2, [0, 0, 1, 1].as_slice()));
        for i in 0..240 {
            assert_eq!(mode_of[i], mode_of[i % 4], "picture {i}");
        }
        // The gate finds the pose of new pictures.
        let new = poses(30, 2, 22);
        for i in 0..60 {
            assert!(modes.gate(new.sample(i))[mode_of[i % 4]] > 0.9, "picture {i}");
        }
    }

    #[test]
    fn groups_grow_with_the_pictures() {
        let count = |pictures| group_count(&ModesConfig::default(), pictures);
        assert_eq!([20, 79, 80, 480, 1775, 3000, 100_000].map(count), [1, 1, 2, 12, 16, 27, 48]);
    }

    #[test]
    fn the_same_seed_gives_the_same_fit() {
        let set = two_products(30, 11);
        let (a, b) = (fitted(&set), fitted(&set));
        assert_eq!((a.modes.whiten, a.scores), (b.modes.whiten, b.scores));
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let refuse = |set: &FeatureSet| fit(set, &config(), [16, 16], &Device::flex(), &mut |_, _| {}).map(|_| ()).unwrap_err();
        assert_eq!(refuse(&two_products(5, 1)), ModesError::TooFew { found: 10, needed: MIN_PICTURES });
        let alike = FeatureSet { tokens: 16, channels: 5, values: vec![1.0; 30 * 16 * 5] };
        assert!(matches!(refuse(&alike), ModesError::Degenerate { .. }));
    }
}
