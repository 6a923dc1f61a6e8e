//! Features exactly as the line computes them: the inspector's own `preprocess` and tract runtime, cached on disk (f16, keyed by model and
//! image hash), so that training and inference cannot drift apart and a second run starts at once.

use crate::checkpoint::write_whole;
use crate::train::FeatureSet;
use cull::dataset::DatasetError;
use cull::model::runtime::FeatureModel;
use cull::preprocess::{PreprocessSpec, Preprocessor};
use half::f16;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Version of the cache: part of every key, so that an old cache is never misread.
const CACHE_FORMAT: &str = "features-1";

/// Why features cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum FeatureError {
    /// The backbone does not run.
    #[error("backbone: {0}")]
    Backbone(String),
    /// An image cannot be read, and `--strict` was given.
    #[error("{path}: {why}; remove it, or leave out --strict to skip such files")]
    Image {
        /// File.
        path: String,
        /// Cause.
        why: String,
    },
    /// The cache folder cannot be used.
    #[error("feature cache {path}: {why}; choose another --cache")]
    Cache {
        /// Folder.
        path: String,
        /// Cause.
        why: String,
    },
    /// Ctrl-C.
    #[error("stopped while computing features; what was computed is cached and will not be computed again")]
    Stopped,
}

/// Computes features of image files.
pub struct Extractor {
    spec: PreprocessSpec,
    model_file: PathBuf,
    cache: PathBuf,
    key: [u8; 32],
    grid: [usize; 2],
    threads: usize,
}

/// Features of the images that could be read.
pub struct Extracted {
    /// Features, in the order of `kept`.
    pub set: FeatureSet,
    /// Index into the list given, per sample.
    pub kept: Vec<usize>,
    /// Images that were skipped: index and cause.
    pub skipped: Vec<(usize, String)>,
    /// Samples that came from the cache.
    pub from_cache: usize,
}

impl Extracted {
    /// First pair of a sample here and one of `other` with equal features, as indices into their lists: the same picture, though the files may differ
    /// (renamed, stored in another lossless format). `wanted` says which of the others count.
    pub fn same_picture(&self, other: &Self, wanted: impl Fn(usize) -> bool) -> Option<(usize, usize)> {
        let digests = |from: &Self, index: usize| -> [u8; 32] {
            let mut hash = Sha256::new();
            from.set.sample(index).iter().for_each(|v| hash.update(v.to_le_bytes()));
            hash.finalize().into()
        };
        let others: HashMap<[u8; 32], usize> =
            other.kept.iter().enumerate().filter(|(_, index)| wanted(**index)).map(|(at, index)| (digests(other, at), *index)).collect();
        if others.is_empty() {
            return None;
        }
        self.kept.iter().enumerate().find_map(|(at, index)| others.get(&digests(self, at)).map(|found| (*index, *found)))
    }
}

impl Extractor {
    /// `feature_onnx` is the file made by [`crate::onnx::feature_file`]; it is kept in the cache folder.
    ///
    /// # Errors
    /// When the cache folder cannot be written.
    pub fn new(feature_onnx: &[u8], spec: &PreprocessSpec, grid: [usize; 2], cache: &Path, threads: usize) -> Result<Self, FeatureError> {
        let mut hash = Sha256::new();
        hash.update(CACHE_FORMAT);
        hash.update(feature_onnx);
        hash.update(format!("{spec:?}"));
        let key: [u8; 32] = hash.finalize().into();
        let cache = cache.join(hex(&key[..8]));
        let model_file = cache.join("features.onnx");
        let fail = |e: std::io::Error| FeatureError::Cache { path: cache.display().to_string(), why: e.to_string() };
        std::fs::create_dir_all(&cache).map_err(fail)?;
        write_whole(&model_file, feature_onnx).map_err(fail)?;
        Ok(Self { spec: spec.clone(), model_file, cache, key, grid, threads: threads.max(1) })
    }

    /// Features of `paths`. `on_image` is called once an image, from any thread; `stop` ends early.
    ///
    /// # Errors
    /// When the backbone does not run, or, with `strict`, at the first image that cannot be read.
    pub fn extract(
        &self,
        paths: &[PathBuf],
        strict: bool,
        stop: &AtomicBool,
        on_image: &(dyn Fn() + Sync),
    ) -> Result<Extracted, FeatureError> {
        let next = AtomicUsize::new(0);
        let abort = AtomicBool::new(false);
        let per_thread: Vec<Result<Vec<Item>, FeatureError>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads.min(paths.len()).max(1))
                .map(|_| scope.spawn(|| self.work(paths, strict, &next, &abort, stop, on_image)))
                .collect();
            workers
                .into_iter()
                .map(|w| {
                    w.join().unwrap_or_else(|_| {
                        Err(FeatureError::Backbone("a feature thread panicked; please report the image it was on".into()))
                    })
                })
                .collect()
        });
        let mut items = Vec::with_capacity(paths.len());
        for part in per_thread {
            items.extend(part?);
        }
        if stop.load(Ordering::Relaxed) && items.len() < paths.len() {
            return Err(FeatureError::Stopped);
        }
        items.sort_by_key(|i| i.index);
        let tokens = self.grid[0] * self.grid[1];
        let mut out = Extracted { set: FeatureSet { tokens, ..Default::default() }, kept: Vec::new(), skipped: Vec::new(), from_cache: 0 };
        for item in items {
            match item.result {
                Ok((values, cached)) => {
                    out.set.channels = values.len() / tokens;
                    out.set.values.extend(values.iter().map(|v| v.to_f32()));
                    out.kept.push(item.index);
                    out.from_cache += usize::from(cached);
                }
                Err(why) => out.skipped.push((item.index, why)),
            }
        }
        Ok(out)
    }

    /// Whether the features of a picture are cached already.
    pub fn is_cached(&self, path: &Path) -> bool {
        std::fs::read(path).is_ok_and(|bytes| self.cache_file(&bytes).is_file())
    }

    /// Where the features of a picture file with these bytes are kept.
    fn cache_file(&self, bytes: &[u8]) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update(self.key);
        hash.update(bytes);
        self.cache.join(format!("{}.f16", hex(&hash.finalize()[..16])))
    }

    fn work(
        &self,
        paths: &[PathBuf],
        strict: bool,
        next: &AtomicUsize,
        abort: &AtomicBool,
        stop: &AtomicBool,
        on_image: &(dyn Fn() + Sync),
    ) -> Result<Vec<Item>, FeatureError> {
        let mut engine: Option<Engine> = None;
        let mut items = Vec::new();
        while !stop.load(Ordering::Relaxed) && !abort.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(path) = paths.get(index) else { break };
            let result = self.one(path, &mut engine);
            let result = match result {
                Err(OneError::Backbone(why)) => {
                    abort.store(true, Ordering::Relaxed);
                    return Err(FeatureError::Backbone(why));
                }
                Err(OneError::Cache(error)) => {
                    abort.store(true, Ordering::Relaxed);
                    return Err(error);
                }
                Err(OneError::Image(why)) if strict => {
                    abort.store(true, Ordering::Relaxed);
                    return Err(FeatureError::Image { path: path.display().to_string(), why });
                }
                Err(OneError::Image(why)) => Err(why),
                Ok(values) => Ok(values),
            };
            items.push(Item { index, result });
            on_image();
        }
        Ok(items)
    }

    /// `[tokens, channels]` as f16, and whether it came from the cache.
    fn one(&self, path: &Path, engine: &mut Option<Engine>) -> Result<(Vec<f16>, bool), OneError> {
        let bytes = std::fs::read(path).map_err(|e| OneError::Image(format!("cannot be read ({e})")))?;
        let file = self.cache_file(&bytes);
        if let Ok(cached) = std::fs::read(&file)
            && !cached.is_empty()
            && cached.len() % (2 * self.grid[0] * self.grid[1]) == 0
        {
            return Ok((cached.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect(), true));
        }
        if engine.is_none() {
            *engine = Some(Engine::new(self).map_err(OneError::Backbone)?);
        }
        let Some(engine) = engine.as_mut() else { return Err(OneError::Backbone("no engine".into())) };
        let values = engine.run(path, self.grid[0] * self.grid[1])?;
        let out: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        write_whole(&file, &out)
            .map_err(|e| OneError::Cache(FeatureError::Cache { path: file.display().to_string(), why: e.to_string() }))?;
        Ok((values, false))
    }
}

/// Shapes `[channels, height, width]` of a backbone's stages for an input of `input_px` = `[height, width]`. `stages_onnx` is what
/// [`crate::onnx::Backbone::stages`] gives; it is written to the cache folder for the runtime to read, and removed.
///
/// # Errors
/// When the cache folder cannot be written or the backbone does not load.
pub fn stage_shapes(stages_onnx: &[u8], input_px: [usize; 2], cache: &Path) -> Result<Vec<[usize; 3]>, FeatureError> {
    let fail = |e: std::io::Error| FeatureError::Cache { path: cache.display().to_string(), why: e.to_string() };
    std::fs::create_dir_all(cache).map_err(fail)?;
    let file = cache.join(format!("stages-{}.onnx", std::process::id()));
    write_whole(&file, stages_onnx).map_err(fail)?;
    let model = FeatureModel::load(&file, [3, input_px[0], input_px[1]]);
    // A file left behind costs a few megabytes and nothing else.
    let _ = std::fs::remove_file(&file);
    model
        .map_err(|e| FeatureError::Backbone(e.to_string()))?
        .output_shapes()
        .iter()
        .map(|shape| match shape.as_slice() {
            &[1, channels, height, width] if channels * height * width > 0 => Ok([channels, height, width]),
            other => Err(FeatureError::Backbone(format!("a stage has the shape {other:?}, expected [1, channels, height, width]"))),
        })
        .collect()
}

struct Item {
    index: usize,
    result: Result<(Vec<f16>, bool), String>,
}

enum OneError {
    Image(String),
    Backbone(String),
    Cache(FeatureError),
}

struct Engine {
    preprocessor: Preprocessor,
    model: FeatureModel,
    input: Vec<f32>,
}

impl Engine {
    fn new(from: &Extractor) -> Result<Self, String> {
        let shape = [3, from.spec.height_px as usize, from.spec.width_px as usize];
        let model = FeatureModel::load(&from.model_file, shape).map_err(|e| e.to_string())?;
        Ok(Self { preprocessor: Preprocessor::new(&from.spec, None), model, input: vec![0.0; shape.iter().product()] })
    }

    fn run(&mut self, path: &Path, tokens: usize) -> Result<Vec<f16>, OneError> {
        let frame = cull::dataset::load_frame(path).map_err(|e| match e {
            // The path is named by whoever reports this.
            DatasetError::Picture { why, .. } => OneError::Image(why),
            other => OneError::Image(other.to_string()),
        })?;
        self.preprocessor.run(&frame, &mut self.input).map_err(|e| OneError::Image(e.to_string()))?;
        let outputs = self.model.run(&self.input).map_err(|e| OneError::Backbone(e.to_string()))?;
        let features = outputs.first().ok_or_else(|| OneError::Backbone("gave no output".into()))?;
        let channels = features.values.len() / tokens;
        // [channels, tokens] -> [tokens, channels]
        let mut turned = vec![f16::ZERO; channels * tokens];
        for (c, plane) in features.values.chunks_exact(tokens).enumerate() {
            for (t, v) in plane.iter().enumerate() {
                if !v.is_finite() {
                    return Err(OneError::Backbone(format!("gave a feature that is not a number for {}", path.display())));
                }
                if let Some(cell) = turned.get_mut(t * channels + c) {
                    *cell = f16::from_f32(*v);
                }
            }
        }
        Ok(turned)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
