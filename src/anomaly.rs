//! Anomaly map -> image score and regions (paper, section 3.1 and supplement). Pure: no I/O, no clock, no threads.
//!
//! Bilinear upsampling and average pooling are both linear and separable, so the pooled, upsampled map of the paper is `R * M * C^T` with
//! `M` the grid and `R`, `C` fixed matrices with three or four non-zero weights a row. [`Scorer`] computes it that way and never makes the
//! upsampled picture for a score.

use serde::{Deserialize, Serialize};

/// The model's anomaly map on its feature grid, row-major `[grid_rows, grid_cols]`: per location the L2 norm over channels of
/// (reconstruction - features), after the bundle's residual normalisation if it has one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnomalyMap {
    /// Rows of the grid (14 in the paper).
    pub grid_rows: usize,
    /// Columns of the grid (14 in the paper).
    pub grid_cols: usize,
    /// `grid_rows * grid_cols` values, row-major.
    pub values: Vec<f32>,
}

impl AnomalyMap {
    /// A map of zeros, for pools: inference then fills it without allocating.
    pub fn zeros(grid: [usize; 2]) -> Self {
        Self { grid_rows: grid[0], grid_cols: grid[1], values: vec![0.0; grid[0] * grid[1]] }
    }

    fn is_consistent(&self) -> bool {
        self.grid_rows > 0 && self.grid_cols > 0 && self.values.len() == self.grid_rows * self.grid_cols
    }
}

/// How an anomaly map becomes one image score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreRule {
    /// The paper's: upsample to the input size (bilinear, align corners), average-pool with stride 1, take the maximum.
    PooledMax {
        /// Side of the pooling window in input pixels (16 in the paper).
        window_px: usize,
    },
    /// Mean of the highest share of the grid's values.
    TopMean {
        /// Share of the grid's locations, 0 < share <= 1.
        share: f32,
    },
}

impl ScoreRule {
    /// The paper's rule.
    pub const PAPER: Self = Self::PooledMax { window_px: 16 };
}

/// A connected region of high anomaly, in input pixels of the model (before mapping back through the ROI).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Region {
    /// Left edge.
    pub x_px: u32,
    /// Top edge.
    pub y_px: u32,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Highest map value inside.
    pub peak: f32,
}

/// At most that many regions are reported, the highest peaks first: more do not help anybody at the line.
pub const MAX_REGIONS: usize = 16;

/// Scores maps of one grid for one input size. One per thread; allocates only in [`Scorer::new`].
pub struct Scorer {
    rule: ScoreRule,
    grid: [usize; 2],
    /// `rule`'s pooled upsampling, by row and by column; unused for [`ScoreRule::TopMean`].
    pooled: [Band; 2],
    /// Plain upsampling, for regions.
    plain: [Band; 2],
    /// `[grid row][output column]`: the map after the horizontal pass.
    stretched: Vec<f32>,
    /// One output row; also the scratch copy of the map for [`ScoreRule::TopMean`].
    row: Vec<f32>,
    runs: [Vec<Run>; 2],
    components: Vec<Component>,
}

/// Sparse rows of an upsampling matrix: output `i` = sum over `t < count` of `weights[i * count + t] * input[start[i] + t]`.
struct Band {
    count: usize,
    start: Vec<usize>,
    weights: Vec<f32>,
}

impl Band {
    /// Bilinear, align corners, from `input` to `output` samples, then averaged over `window` neighbours with stride 1 (no padding):
    /// `output - window + 1` rows.
    fn new(input: usize, output: usize, window: usize) -> Self {
        let outputs = output + 1 - window;
        let mut dense = vec![vec![0.0f64; input]; outputs];
        for (i, row) in dense.iter_mut().enumerate() {
            for x in i..i + window {
                let (low, high, fraction) = corner_aligned(x, input, output);
                row[low] += (1.0 - fraction) / window as f64;
                row[high] += fraction / window as f64;
            }
        }
        let span = |row: &[f64]| {
            let first = row.iter().position(|&w| w != 0.0).unwrap_or(0);
            (first, row.iter().rposition(|&w| w != 0.0).unwrap_or(0) + 1 - first)
        };
        let count = dense.iter().map(|row| span(row).1).max().unwrap_or(1);
        let start: Vec<usize> = dense.iter().map(|row| span(row).0.min(input - count)).collect();
        let weights = dense.iter().zip(&start).flat_map(|(row, &s)| row[s..s + count].iter().map(|&w| w as f32)).collect();
        Self { count, start, weights }
    }

    fn outputs(&self) -> usize {
        self.start.len()
    }

    fn row(&self, i: usize) -> (usize, &[f32]) {
        (self.start[i], &self.weights[i * self.count..(i + 1) * self.count])
    }
}

/// Where output sample `x` of `output` falls between the `input` samples when both ends coincide: neighbours and the weight of the higher.
fn corner_aligned(x: usize, input: usize, output: usize) -> (usize, usize, f64) {
    if output <= 1 || input <= 1 {
        return (0, 0, 0.0);
    }
    let position = x as f64 * (input - 1) as f64 / (output - 1) as f64;
    let low = (position as usize).min(input - 1);
    (low, (low + 1).min(input - 1), position - low as f64)
}

/// Part of one row at or above the threshold, `[start, end)`.
#[derive(Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    component: usize,
}

/// A node of the union-find forest; `parent == own index` for roots, whose box and peak are valid.
#[derive(Clone, Copy)]
struct Component {
    parent: usize,
    left: usize,
    right: usize,
    top: usize,
    bottom: usize,
    peak: f32,
}

impl Scorer {
    /// A scorer for maps of `grid` = `[rows, columns]` and a model input of `input_px` = `[height, width]`. Zero sizes count as one; a window larger
    /// than the input, as the input (bundles with such values are refused when loaded).
    pub fn new(rule: ScoreRule, grid: [usize; 2], input_px: [usize; 2]) -> Self {
        let grid = grid.map(|n| n.max(1));
        let input_px = input_px.map(|n| n.max(1));
        let window = match rule {
            ScoreRule::PooledMax { window_px } => window_px.max(1),
            ScoreRule::TopMean { .. } => 1,
        };
        let bands = |window: usize| [0, 1].map(|axis| Band::new(grid[axis], input_px[axis], window.min(input_px[axis])));
        let longest_row = input_px[1].max(grid[0] * grid[1]);
        let most_runs = input_px[1].div_ceil(2);
        Self {
            rule,
            grid,
            pooled: bands(window),
            plain: bands(1),
            stretched: vec![0.0; grid[0] * input_px[1]],
            row: vec![0.0; longest_row],
            runs: [Vec::with_capacity(most_runs), Vec::with_capacity(most_runs)],
            // Every region needs a row and a column between itself and the next one; labels are also spent on runs that merge later.
            components: Vec::with_capacity(most_runs * input_px[0].div_ceil(2)),
        }
    }

    /// The image score of `map` by this scorer's rule. NaN, which ends in a fault verdict, when the map has another grid or holds a value that is not
    /// finite.
    pub fn score(&mut self, map: &AnomalyMap) -> f32 {
        if !self.accepts(map) || map.values.iter().any(|value| !value.is_finite()) {
            return f32::NAN;
        }
        match self.rule {
            ScoreRule::PooledMax { .. } => {
                let mut highest = f32::NEG_INFINITY;
                let [rows, columns] = &self.pooled;
                stretch(map, columns, &mut self.stretched);
                for y in 0..rows.outputs() {
                    let row = combine(rows, y, &self.stretched, &mut self.row[..columns.outputs()]);
                    highest = row.iter().fold(highest, |a, &b| if b > a { b } else { a });
                }
                highest
            }
            ScoreRule::TopMean { share } => {
                let values = &mut self.row[..map.values.len()];
                values.copy_from_slice(&map.values);
                let top = ((f64::from(share) * values.len() as f64).round() as usize).clamp(1, values.len());
                values.select_nth_unstable_by(top - 1, |a, b| b.total_cmp(a));
                (values[..top].iter().map(|&value| f64::from(value)).sum::<f64>() / top as f64) as f32
            }
        }
    }

    /// Connected regions (8 neighbours) of the upsampled map at or above `threshold`, the highest peaks first, at most [`MAX_REGIONS`], into `out`
    /// (cleared first; its capacity is reused). Boxes are in input pixels. None for a map with another grid or a threshold that is NaN.
    pub fn regions(&mut self, map: &AnomalyMap, threshold: f32, out: &mut Vec<Region>) {
        out.clear();
        // The upsampled map never exceeds the grid's maximum: most frames of a good line end here.
        if !self.accepts(map) || !map.values.iter().any(|&value| value >= threshold) {
            return;
        }
        let [rows, columns] = &self.plain;
        stretch(map, columns, &mut self.stretched);
        self.components.clear();
        let hot = |value: f32| value >= threshold;
        let [above, current] = &mut self.runs;
        above.clear();
        for y in 0..rows.outputs() {
            let row = combine(rows, y, &self.stretched, &mut self.row[..columns.outputs()]);
            current.clear();
            let mut x = 0;
            while x < row.len() {
                if !hot(row[x]) {
                    x += 1;
                    continue;
                }
                let start = x;
                let mut peak = row[x];
                while x < row.len() && hot(row[x]) {
                    peak = peak.max(row[x]);
                    x += 1;
                }
                let mut component = None;
                // Runs of the row above that touch this one, corners included.
                for run in above.iter().filter(|run| run.start <= x && run.end >= start) {
                    let root = find(&mut self.components, run.component);
                    component = Some(match component {
                        Some(mine) => union(&mut self.components, mine, root),
                        None => root,
                    });
                }
                let component = component.unwrap_or_else(|| {
                    let parent = self.components.len();
                    self.components.push(Component { parent, left: start, right: x, top: y, bottom: y + 1, peak });
                    parent
                });
                let root = &mut self.components[component];
                root.left = root.left.min(start);
                root.right = root.right.max(x);
                root.bottom = y + 1;
                root.peak = root.peak.max(peak);
                current.push(Run { start, end: x, component });
            }
            std::mem::swap(above, current);
        }
        for (index, component) in self.components.iter().enumerate().filter(|(index, component)| component.parent == *index) {
            debug_assert_eq!(component.parent, index);
            let region = Region {
                x_px: component.left as u32,
                y_px: component.top as u32,
                width_px: (component.right - component.left) as u32,
                height_px: (component.bottom - component.top) as u32,
                peak: component.peak,
            };
            // Insertion into a list of at most 16: sorted by peak without a heap.
            let at = out.partition_point(|other| other.peak >= region.peak);
            if at < MAX_REGIONS {
                out.truncate(MAX_REGIONS - 1);
                out.insert(at, region);
            }
        }
    }

    fn accepts(&self, map: &AnomalyMap) -> bool {
        map.is_consistent() && [map.grid_rows, map.grid_cols] == self.grid
    }
}

fn find(components: &mut [Component], mut index: usize) -> usize {
    while components[index].parent != index {
        let grandparent = components[components[index].parent].parent;
        components[index].parent = grandparent;
        index = grandparent;
    }
    index
}

/// Merge two roots; the older one (higher up in the picture) stays.
fn union(components: &mut [Component], a: usize, b: usize) -> usize {
    let (keep, gone) = (a.min(b), a.max(b));
    if keep != gone {
        let merged = components[gone];
        components[gone].parent = keep;
        let root = &mut components[keep];
        root.left = root.left.min(merged.left);
        root.right = root.right.max(merged.right);
        root.top = root.top.min(merged.top);
        root.bottom = root.bottom.max(merged.bottom);
        root.peak = root.peak.max(merged.peak);
    }
    keep
}

/// Horizontal pass: each grid row to `columns.outputs()` samples.
fn stretch(map: &AnomalyMap, columns: &Band, stretched: &mut [f32]) {
    let width = columns.outputs();
    for (source, target) in map.values.chunks_exact(map.grid_cols).zip(stretched.chunks_exact_mut(width)) {
        for (x, value) in target.iter_mut().enumerate() {
            let (start, weights) = columns.row(x);
            *value = weights.iter().zip(&source[start..]).map(|(w, v)| w * v).sum();
        }
    }
}

/// Vertical pass: output row `y` from the stretched grid rows.
fn combine<'a>(rows: &Band, y: usize, stretched: &[f32], row: &'a mut [f32]) -> &'a [f32] {
    let (start, weights) = rows.row(y);
    row.fill(0.0);
    for (source, &weight) in stretched.chunks_exact(row.len()).skip(start).zip(weights) {
        for (sum, &value) in row.iter_mut().zip(source) {
            *sum += weight * value;
        }
    }
    row
}

/// Upsample `map` to `height` x `width` (bilinear, align corners: the corners of both pictures coincide), row-major into `out`. For heat
/// maps and pixel metrics. A map without values, or an `out` that is not `height * width` long, fills `out` with NaN.
pub fn upsample(map: &AnomalyMap, height: usize, width: usize, out: &mut [f32]) {
    if !map.is_consistent() || width == 0 || out.len() != height * width {
        out.fill(f32::NAN);
        return;
    }
    for (y, row) in out.chunks_exact_mut(width).enumerate() {
        let (low, high, fraction) = corner_aligned(y, map.grid_rows, height);
        let fraction = fraction as f32;
        let upper = &map.values[low * map.grid_cols..(low + 1) * map.grid_cols];
        let lower = &map.values[high * map.grid_cols..(high + 1) * map.grid_cols];
        for (x, value) in row.iter_mut().enumerate() {
            let (left, right, across) = corner_aligned(x, map.grid_cols, width);
            let across = across as f32;
            let top = upper[left] + across * (upper[right] - upper[left]);
            let bottom = lower[left] + across * (lower[right] - lower[left]);
            *value = top + fraction * (bottom - top);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn map(grid_rows: usize, grid_cols: usize, values: Vec<f32>) -> AnomalyMap {
        AnomalyMap { grid_rows, grid_cols, values }
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    }

    fn pair(value: &Value) -> [usize; 2] {
        [0, 1].map(|i| value[i].as_u64().unwrap() as usize)
    }

    #[test]
    fn upsampling_and_score_equal_pytorch() {
        let cases: Value = serde_json::from_str(include_str!("../tests/fixtures/anomaly.json")).unwrap();
        for case in cases.as_array().unwrap() {
            let (grid, input) = (pair(&case["grid"]), pair(&case["input"]));
            let map = map(grid[0], grid[1], floats(&case["values"]));
            let window_px = case["window"].as_u64().unwrap() as usize;
            let score = Scorer::new(ScoreRule::PooledMax { window_px }, grid, input).score(&map);
            let expected = case["score"].as_f64().unwrap() as f32;
            assert!((score - expected).abs() <= 1e-5 * expected, "{grid:?}: {score} against {expected}");
            let mut up = vec![0.0; input[0] * input[1]];
            upsample(&map, input[0], input[1], &mut up);
            for (probe, expected) in case["probes"].as_array().unwrap().iter().zip(floats(&case["upsampled"])) {
                let [y, x] = pair(probe);
                assert!((up[y * input[1] + x] - expected).abs() <= 1e-5 * expected.max(1.0), "{grid:?} at {y}, {x}");
            }
        }
    }

    /// One tensor of a safetensors file: 8 bytes of header length, a JSON header, raw little-endian data.
    fn tensor(file: &[u8], name: &str) -> (Vec<usize>, Vec<f32>) {
        let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
        let entry = &header[name];
        assert_eq!(entry["dtype"], "F32", "{name}");
        let [start, end] = pair(&entry["data_offsets"]);
        let data = &file[8 + header_len..][start..end];
        let shape = entry["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        (shape, data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    #[test]
    fn golden_vectors_of_the_reference_model() {
        let shared = std::env::var_os("CULL_SHARED")
            .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../shared").into(), std::path::PathBuf::from);
        for name in ["uniad_14x14", "uniad_tiny", "uniad_no_mask"] {
            let path = shared.join("golden").join(name);
            let Ok(file) = std::fs::read(path.with_extension("safetensors")) else {
                eprintln!("SKIPPED: no golden vectors at {}", path.display());
                continue;
            };
            let sizes: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
            let grid = pair(&sizes["grid"]);
            let (shape, input) = tensor(&file, "input");
            let (_, reconstruction) = tensor(&file, "reconstruction");
            let (map_shape, upsampled) = tensor(&file, "anomaly_map");
            let (_, scores) = tensor(&file, "image_score");
            let (batch, tokens, channels, px) = (shape[0], shape[1], shape[2], [map_shape[1], map_shape[2]]);
            let mut scorer = Scorer::new(ScoreRule::PAPER, grid, px);
            for image in 0..batch {
                let token = |t: usize| (image * tokens + t) * channels..(image * tokens + t + 1) * channels;
                let norm = |t: usize| {
                    let difference = input[token(t)].iter().zip(&reconstruction[token(t)]).map(|(a, b)| f64::from(a - b).powi(2));
                    difference.sum::<f64>().sqrt() as f32
                };
                let map = map(grid[0], grid[1], (0..tokens).map(norm).collect());
                let score = scorer.score(&map);
                assert!((score - scores[image]).abs() <= 1e-4 * scores[image], "{name}: {score} against {}", scores[image]);
                let mut up = vec![0.0; px[0] * px[1]];
                upsample(&map, px[0], px[1], &mut up);
                for (ours, theirs) in up.iter().zip(&upsampled[image * up.len()..]) {
                    assert!((ours - theirs).abs() <= 1e-4 * theirs.abs(), "{name}: {ours} against {theirs}");
                }
            }
        }
    }

    #[test]
    fn a_map_that_is_not_finite_or_not_ours_scores_nan() {
        for rule in [ScoreRule::PAPER, ScoreRule::TopMean { share: 0.1 }] {
            let mut scorer = Scorer::new(rule, [2, 2], [32, 32]);
            assert!(scorer.score(&map(2, 2, vec![1.0; 4])).is_finite());
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(scorer.score(&map(2, 2, vec![0.0, bad, 0.0, 0.0])).is_nan(), "{rule:?} with {bad}");
            }
            assert!(scorer.score(&map(4, 1, vec![1.0; 4])).is_nan());
            assert!(scorer.score(&map(2, 2, vec![1.0; 3])).is_nan());
            assert!(scorer.score(&AnomalyMap::default()).is_nan());
        }
    }

    #[test]
    fn top_mean_takes_the_highest_share() {
        let values = map(2, 5, vec![1.0, 9.0, 2.0, 8.0, 3.0, 0.0, 0.0, 0.0, 0.0, 7.0]);
        for (share, expected) in [(0.1, 9.0), (0.2, 8.5), (0.3, 8.0), (1.0, 3.0), (0.0001, 9.0)] {
            assert_eq!(Scorer::new(ScoreRule::TopMean { share }, [2, 5], [32, 32]).score(&values), expected, "share {share}");
        }
    }

    #[test]
    fn odd_sizes_do_not_panic() {
        for (grid, px, window_px) in [([1, 1], [1, 1], 16), ([0, 0], [0, 0], 0), ([3, 3], [2, 50], 16), ([20, 20], [4, 4], 2)] {
            let mut scorer = Scorer::new(ScoreRule::PooledMax { window_px }, grid, px);
            let ones = AnomalyMap { grid_rows: grid[0], grid_cols: grid[1], values: vec![1.0; grid[0] * grid[1]] };
            let score = scorer.score(&ones);
            assert!(score.is_nan() || (score - 1.0).abs() < 1e-6, "{grid:?}: {score}");
        }
    }

    #[test]
    fn regions_are_boxes_of_what_stands_out() {
        let mut values = vec![0.0; 14 * 14];
        values[2 * 14 + 3] = 5.0;
        values[10 * 14 + 9] = 7.0;
        values[10 * 14 + 10] = 6.0;
        let map = map(14, 14, values);
        let mut scorer = Scorer::new(ScoreRule::PAPER, [14, 14], [224, 224]);
        let mut regions = Vec::with_capacity(MAX_REGIONS);
        scorer.regions(&map, 2.5, &mut regions);
        assert_eq!(regions.len(), 2, "{regions:?}");
        assert!(regions[0].peak > 6.5 && regions[0].peak <= 7.0, "highest first: {regions:?}");
        for (region, (x, y)) in regions.iter().zip([(9, 10), (3, 2)]) {
            let (cx, cy) = (x * 223 / 13, y * 223 / 13);
            assert!((region.x_px..region.x_px + region.width_px).contains(&cx), "{region:?} holds column {cx}");
            assert!((region.y_px..region.y_px + region.height_px).contains(&cy), "{region:?} holds row {cy}");
        }
        scorer.regions(&map, 100.0, &mut regions);
        assert!(regions.is_empty());
        scorer.regions(&map, f32::NAN, &mut regions);
        assert!(regions.is_empty());
        scorer.regions(&map, 0.0, &mut regions);
        assert_eq!(regions.len(), 1);
        assert_eq!((regions[0].width_px, regions[0].height_px), (224, 224));
    }

    /// Flood fill over the upsampled map: slow and obvious.
    fn regions_oracle(map: &AnomalyMap, px: [usize; 2], threshold: f32) -> Vec<Region> {
        let mut up = vec![0.0; px[0] * px[1]];
        upsample(map, px[0], px[1], &mut up);
        let mut seen = vec![false; up.len()];
        let mut regions = vec![];
        for first in 0..up.len() {
            if seen[first] || up[first] < threshold {
                continue;
            }
            let (mut stack, mut cells) = (vec![first], vec![]);
            seen[first] = true;
            while let Some(at) = stack.pop() {
                cells.push(at);
                let (y, x) = (at / px[1], at % px[1]);
                for ny in y.saturating_sub(1)..(y + 2).min(px[0]) {
                    for nx in x.saturating_sub(1)..(x + 2).min(px[1]) {
                        let next = ny * px[1] + nx;
                        if !seen[next] && up[next] >= threshold {
                            seen[next] = true;
                            stack.push(next);
                        }
                    }
                }
            }
            let bounds = |f: fn(usize, usize) -> usize| {
                let all = cells.iter().map(|&at| f(at, px[1]));
                (all.clone().min().unwrap(), all.max().unwrap() + 1)
            };
            let ((top, bottom), (left, right)) = (bounds(|at, w| at / w), bounds(|at, w| at % w));
            regions.push(Region {
                x_px: left as u32,
                y_px: top as u32,
                width_px: (right - left) as u32,
                height_px: (bottom - top) as u32,
                peak: cells.iter().map(|&at| up[at]).fold(f32::MIN, f32::max),
            });
        }
        regions.sort_by(|a, b| b.peak.total_cmp(&a.peak));
        regions.truncate(MAX_REGIONS);
        regions
    }

    proptest! {
        #[test]
        fn regions_equal_a_flood_fill(values in proptest::collection::vec(0f32..1.0, 8 * 9), threshold in 0.3f32..0.95) {
            let map = map(8, 9, values);
            // One pixel a grid node: upsampling is exact, so rounding cannot split the two.
            for px in [[8, 9], [22, 25]] {
                let mut ours = Vec::new();
                Scorer::new(ScoreRule::PAPER, [8, 9], px).regions(&map, threshold, &mut ours);
                let oracle = regions_oracle(&map, px, threshold);
                if px == [8, 9] {
                    prop_assert_eq!(ours, oracle);
                } else {
                    prop_assert!(ours.len().abs_diff(oracle.len()) <= 1);
                }
            }
        }

        #[test]
        fn the_score_grows_with_the_map(values in proptest::collection::vec(0f32..1.0, 6 * 5), at in 0usize..30, more in 0.1f32..5.0) {
            for rule in [ScoreRule::PAPER, ScoreRule::TopMean { share: 0.2 }] {
                let mut scorer = Scorer::new(rule, [6, 5], [96, 80]);
                let before = scorer.score(&map(6, 5, values.clone()));
                let mut higher = values.clone();
                higher[at] += more;
                let after = scorer.score(&map(6, 5, higher.clone()));
                prop_assert!(after >= before);
                let highest = higher.iter().copied().fold(0.0, f32::max);
                prop_assert!(after <= highest * 1.0001);
            }
        }
    }
}
