//! Runs models: [`Model`] for bundles on the line, [`FeatureModel`] for any ONNX file in the trainer.
//!
//! A bundle whose graph our own executor understands as a whole runs there (`plan`: our kernels, no allocation); any other runs
//! through tract, and so do backbones. This is the only module that knows tract's graph types. A model is loaded, checked against its
//! metadata and prepared once; each thread then gets its own [`Session`]. tract may panic on graphs it was never tried with: a panic
//! becomes a [`ModelError`] here and never crosses into a stage of the pipeline.

use super::plan::{Plan, State};
use crate::anomaly::AnomalyMap;
use crate::kernels::isa::Isa;
use crate::model::bundle::{self, Bundle, BundleError, BundleMeta, MAX_TENSOR_ELEMENTS, Problem};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tract_onnx::pb;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::{Cost, TDim};
use tract_onnx::tract_hir::infer::InferenceModelExt;

/// Why a model cannot be used or an inference failed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is no valid bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The graph cannot be run.
    #[error("model {path}: cannot be run ({reason}): export it again as a plain graph of static shapes, or report it with the file")]
    Graph {
        /// The file.
        path: String,
        /// What the runtime said.
        reason: String,
    },
    /// The caller's input has the wrong length.
    #[error("inference: input holds {actual} values, the model takes {expected}")]
    InputLength {
        /// Values the model takes.
        expected: usize,
        /// Values given.
        actual: usize,
    },
    /// One inference failed; the next may succeed.
    #[error("inference failed: {0}")]
    Inference(String),
}

/// What a model is, for people and benches.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModelFacts {
    /// Name in the metadata.
    pub name: String,
    /// Input shape `[1, 3, height, width]`.
    pub input: [usize; 4],
    /// Anomaly map size `[rows, columns]`.
    pub grid: [usize; 2],
    /// Learned parameters.
    pub parameters: u64,
    /// Multiply-adds of one inference (matrix products and convolutions).
    pub multiply_adds: u64,
    /// File size in bytes.
    pub file_bytes: u64,
    /// SHA-256 of the file, as in its metadata.
    pub sha256: String,
    /// ONNX operator set.
    pub opset: i64,
    /// What runs it: `plan (avx512)` is our own executor with the kernels of that instruction set (`, 20 steps in int8` where weights are of
    /// 8 bit and the CPU is faster with them), `tract` the fallback.
    pub engine: String,
    /// Why the model runs through tract, where our executor was tried first: the operator or form that it does not know.
    pub fallback: Option<String>,
    /// Nodes of the optimised graph, steps of the plan.
    pub nodes: usize,
    /// Buffers of one session in bytes; 0 where the engine does not say (tract).
    pub session_bytes: usize,
    /// Time to load, check and optimise, in milliseconds.
    pub load_ms: u64,
}

/// A model ready to run. Cloning shares it.
#[derive(Clone)]
pub struct Model {
    shared: Arc<Shared>,
}

struct Shared {
    meta: BundleMeta,
    facts: ModelFacts,
    engine: Engine,
    /// Threads of a session.
    threads: usize,
}

enum Engine {
    Plan(Box<Plan>),
    Tract(Arc<TypedSimplePlan>),
}

/// Which engine to load a model into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// Our own executor where it understands the graph, else tract. The environment variable `CULL_PLAN=tract` turns this into
    /// [`EngineChoice::Tract`], for comparing.
    #[default]
    Auto,
    /// tract, whatever the graph.
    Tract,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("facts", &self.shared.facts).finish_non_exhaustive()
    }
}

impl Model {
    /// Load a bundle: verify it, check its graph against its metadata, optimise it and run it once on a grey picture.
    ///
    /// `threads_per_frame` is how many threads share one inference, the calling one included; each session keeps its own. Models that run
    /// through tract use one, whatever is asked for (logged).
    ///
    /// # Errors
    /// [`ModelError`] names the file, what is wrong and what to do; a panic inside the runtime is one of these, too.
    pub fn load(path: &Path, threads_per_frame: usize) -> Result<Self, ModelError> {
        Self::from_bundle(Bundle::load(path)?, threads_per_frame)
    }

    /// As [`Model::load`] for a bundle that is verified already.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_bundle(bundle: Bundle, threads_per_frame: usize) -> Result<Self, ModelError> {
        Self::with_threads(bundle, EngineChoice::Auto, threads_per_frame)
    }

    /// As [`Model::from_bundle`], with the engine chosen.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn with_engine(bundle: Bundle, choice: EngineChoice) -> Result<Self, ModelError> {
        Self::with_threads(bundle, choice, 1)
    }

    fn with_threads(bundle: Bundle, choice: EngineChoice, threads: usize) -> Result<Self, ModelError> {
        let threads = threads.max(1);
        let started = Instant::now();
        let path = bundle.path.display().to_string();
        let fail = |reason: String| ModelError::Graph { path: path.clone(), reason };
        let (height, width) = (bundle.meta.preprocess.height_px as usize, bundle.meta.preprocess.width_px as usize);
        let input = [1, 3, height, width];
        let grid = bundle.meta.grid;
        let forced = std::env::var("CULL_PLAN").is_ok_and(|value| value.eq_ignore_ascii_case("tract"));
        let mut fallback = None;
        let plan = if choice == EngineChoice::Tract || forced {
            None
        } else {
            match guarded(|| Plan::build(&bundle.proto, &input, grid, Isa::best()).map_err(|reason| TractError::msg(reason.to_string()))) {
                Ok(plan) => Some(plan),
                Err(reason) => {
                    log::info!("model {path} runs through tract: {reason}");
                    fallback = Some(reason);
                    None
                }
            }
        };
        let (engine, multiply_adds) = match plan {
            Some(plan) => {
                let multiply_adds = plan.multiply_adds;
                (Engine::Plan(Box::new(plan)), multiply_adds)
            }
            None => {
                if threads > 1 {
                    log::warn!("model {path} runs through tract, on one thread a frame instead of {threads}: use more workers");
                }
                let compiled = guarded(|| compile(&bundle.proto, &input)).map_err(fail)?;
                let output = compiled.plan.model().output_fact(0).ok().and_then(concrete_shape);
                let expected = [1, 1, grid[0], grid[1]];
                if compiled.plan.model().outputs.len() != 1 || output.as_deref() != Some(&expected[..]) {
                    return Err(fail(format!("its output has shape {output:?}, its metadata says {expected:?}")));
                }
                (Engine::Tract(compiled.plan), compiled.multiply_adds)
            }
        };
        let facts = ModelFacts {
            name: bundle.meta.name.clone(),
            input,
            grid,
            parameters: bundle.parameters,
            multiply_adds,
            file_bytes: bundle.file_bytes,
            sha256: bundle.meta.sha256.clone(),
            opset: bundle.opset,
            engine: match &engine {
                Engine::Plan(plan) if plan.integer_steps() > 0 => {
                    format!("plan ({}, {} steps in int8)", plan.isa.name(), plan.integer_steps())
                }
                Engine::Plan(plan) => format!("plan ({})", plan.isa.name()),
                Engine::Tract(_) => "tract".into(),
            },
            fallback,
            nodes: match &engine {
                Engine::Plan(plan) => plan.describe().len(),
                Engine::Tract(plan) => plan.model().nodes().len(),
            },
            session_bytes: match &engine {
                Engine::Plan(plan) => plan.session_bytes(threads),
                Engine::Tract(_) => 0,
            },
            load_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let model = Self { shared: Arc::new(Shared { meta: bundle.meta, facts, engine, threads }) };
        let mut map = AnomalyMap::zeros(grid);
        let grey = vec![0.0; 3 * height * width];
        model.session().infer(&grey, &mut map).map_err(|error| fail(error.to_string()))?;
        if map.values.iter().any(|value| !value.is_finite()) {
            return Err(fail("a grey picture gives an anomaly map that is not finite".into()));
        }
        Ok(model)
    }

    /// The bundle's metadata.
    pub fn meta(&self) -> &BundleMeta {
        &self.shared.meta
    }

    /// What the model is.
    pub fn facts(&self) -> &ModelFacts {
        &self.shared.facts
    }

    /// A session: the mutable state of one thread's inferences.
    pub fn session(&self) -> Session {
        let engine = match &self.shared.engine {
            Engine::Plan(plan) => SessionEngine::Plan(Box::new(plan.state(self.shared.threads))),
            Engine::Tract(plan) => SessionEngine::Tract(Box::new(Runner::new(plan, &self.shared.facts.input))),
        };
        Session { shared: Arc::clone(&self.shared), engine }
    }

    /// Run `frames` inferences and report the time by node of the optimised graph, slowest first. For people; the clock itself costs a
    /// little at each node.
    ///
    /// # Errors
    /// [`ModelError`] as for [`Session::infer`].
    pub fn profile(&self, input: &[f32], frames: usize) -> Result<Vec<NodeTime>, ModelError> {
        let count = self.shared.facts.nodes;
        let mut times = vec![Duration::ZERO; count];
        let (mut sums, mut best) = (vec![Duration::ZERO; count], vec![Duration::MAX; count]);
        let mut note = |times: &mut Vec<Duration>, frame: usize| {
            for ((time, sum), best) in times.iter_mut().zip(&mut sums).zip(&mut best).filter(|_| frame > 0) {
                *sum += *time;
                *best = (*time).min(*best);
            }
            times.fill(Duration::ZERO);
        };
        // The first one warms up.
        let described = match &self.shared.engine {
            Engine::Plan(plan) => {
                check_length(input, &self.shared.facts.input)?;
                let mut state = plan.state(self.shared.threads);
                for frame in 0..=frames {
                    plan.run_timed(&mut state, input, &mut times);
                    note(&mut times, frame);
                }
                plan.describe().into_iter().map(|step| (step.name, step.kind.into(), step.sizes, step.multiply_adds)).collect()
            }
            Engine::Tract(plan) => {
                let mut runner = Runner::new(plan, &self.shared.facts.input);
                runner.fill(input)?;
                for frame in 0..=frames {
                    runner.run_timed(&mut times)?;
                    note(&mut times, frame);
                }
                let shape = |fact: &&TypedFact| concrete_shape(fact).map_or("(packed)".into(), |shape| format!("{shape:?}"));
                let shapes = |facts: &[&TypedFact]| facts.iter().map(shape).collect::<Vec<_>>().join(" ");
                let describe = |node: &TypedNode| {
                    let inputs = plan.model().node_input_facts(node.id).map(|facts| shapes(&facts)).unwrap_or_default();
                    let outputs = node.outputs.iter().map(|output| &output.fact).collect::<Vec<_>>();
                    (node.name.clone(), node.op.name().into_owned(), format!("{inputs} -> {}", shapes(&outputs)), 0)
                };
                plan.model().nodes().iter().map(describe).collect::<Vec<_>>()
            }
        };
        let mut nodes: Vec<NodeTime> = described
            .into_iter()
            .zip(sums.iter().zip(&best))
            .filter(|(_, (sum, _))| !sum.is_zero())
            .map(|((name, op, facts, multiply_adds), (sum, best))| NodeTime {
                name,
                op,
                facts,
                multiply_adds,
                mean_us: sum.as_secs_f64() * 1e6 / frames.max(1) as f64,
                best_us: best.as_secs_f64() * 1e6,
            })
            .collect();
        nodes.sort_by(|a, b| b.best_us.total_cmp(&a.best_us));
        Ok(nodes)
    }
}

/// Time spent in one node of the optimised graph.
#[derive(Clone, Debug, serde::Serialize)]
pub struct NodeTime {
    /// Node name.
    pub name: String,
    /// Operator name.
    pub op: String,
    /// Types and shapes of inputs and outputs.
    pub facts: String,
    /// Products that the node sums up; 0 where it does something else or the engine does not say (tract).
    pub multiply_adds: u64,
    /// Mean time of one inference in microseconds.
    pub mean_us: f64,
    /// Shortest time of the inferences measured, in microseconds: nearest to what an idle machine would need.
    pub best_us: f64,
}

/// The state of one thread's inferences. Make one a thread; it keeps its buffers.
pub struct Session {
    shared: Arc<Shared>,
    engine: SessionEngine,
}

enum SessionEngine {
    Plan(Box<State>),
    Tract(Box<Runner>),
}

impl Session {
    /// One inference: `input` is `[3, height, width]`, normalised as [`crate::preprocess::Preprocessor`] leaves it; the anomaly map is
    /// written to `map` (its buffer is reused). The values are the model's, finite or not: the score decides what to make of that.
    ///
    /// # Errors
    /// [`ModelError::InputLength`], or [`ModelError::Inference`] when the runtime failed or panicked; `map` is then undefined and the part
    /// must not pass. The session stays usable.
    pub fn infer(&mut self, input: &[f32], map: &mut AnomalyMap) -> Result<(), ModelError> {
        let [grid_rows, grid_cols] = self.shared.facts.grid;
        let mut read = |values: &[f32]| {
            if values.len() != grid_rows * grid_cols {
                return Err(format!("the output holds {} values instead of {}", values.len(), grid_rows * grid_cols));
            }
            map.grid_rows = grid_rows;
            map.grid_cols = grid_cols;
            map.values.clear();
            map.values.extend_from_slice(values);
            Ok(())
        };
        match (&mut self.engine, &self.shared.engine) {
            (SessionEngine::Plan(state), Engine::Plan(plan)) => {
                check_length(input, &self.shared.facts.input)?;
                let outcome = catch_unwind(AssertUnwindSafe(|| read(plan.run(state, input))));
                outcome.unwrap_or_else(|panic| {
                    // The panic may have left a buffer out of its place.
                    **state = plan.state(self.shared.threads);
                    Err(format!("the plan panicked: {}", panic_text(panic.as_ref())))
                })
            }
            (SessionEngine::Tract(runner), _) => {
                runner.fill(input)?;
                return runner.run(|outputs| {
                    let values = outputs.first().ok_or("no output")?;
                    read(values.try_as_plain_ram().and_then(|plain| plain.as_slice::<f32>()).map_err(|error| format!("{error:#}"))?)
                });
            }
            (SessionEngine::Plan(_), Engine::Tract(_)) => Err("the session belongs to another model".into()),
        }
        .map_err(ModelError::Inference)
    }

    /// The model this session runs.
    pub fn facts(&self) -> &ModelFacts {
        &self.shared.facts
    }
}

/// One output of a [`FeatureModel`].
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// Output name in the ONNX graph.
    pub name: String,
    /// Shape, batch dimension of 1 included.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// Any ONNX file with one image input and float outputs, for the trainer: backbones. Uses the same runtime as the line.
pub struct FeatureModel {
    runner: Runner,
    names: Vec<String>,
}

impl FeatureModel {
    /// Load `path` for an input of `[channels, height, width]` (its batch dimension, symbolic or not, becomes 1).
    ///
    /// # Errors
    /// [`ModelError`] as for [`Model::load`], except that no metadata is needed.
    pub fn load(path: &Path, input: [usize; 3]) -> Result<Self, ModelError> {
        let bundle_error = |problem: Problem| ModelError::Bundle(BundleError { path: path.into(), problem });
        let proto = bundle::read_limited(path).and_then(|bytes| bundle::decode(&bytes)).map_err(bundle_error)?;
        let graph = proto.graph.as_ref().ok_or_else(|| bundle_error(Problem::NotOnnx("it has no graph".into())))?;
        bundle::check_operators(&proto, graph).map_err(bundle_error)?;
        let names = graph.output.iter().map(|output| output.name.clone()).collect();
        let shape = [1, input[0], input[1], input[2]];
        let compiled =
            guarded(|| compile(&proto, &shape)).map_err(|reason| ModelError::Graph { path: path.display().to_string(), reason })?;
        Ok(Self { runner: Runner::new(&compiled.plan, &shape), names })
    }

    /// Names of the outputs, in the order of [`FeatureModel::run`]'s result.
    pub fn output_names(&self) -> &[String] {
        &self.names
    }

    /// Shapes of the outputs, batch dimension included.
    pub fn output_shapes(&self) -> Vec<Vec<usize>> {
        let model = self.runner.plan.model();
        (0..model.outputs.len()).map(|index| model.output_fact(index).ok().and_then(concrete_shape).unwrap_or_default()).collect()
    }

    /// All outputs for one input of `[channels, height, width]`.
    ///
    /// # Errors
    /// [`ModelError::InputLength`] or [`ModelError::Inference`].
    pub fn run(&mut self, input: &[f32]) -> Result<Vec<Features>, ModelError> {
        self.runner.fill(input)?;
        let mut features = Vec::with_capacity(self.names.len());
        self.runner.run(|outputs| {
            for (name, value) in self.names.iter().zip(outputs) {
                let value = value.cast_to::<f32>().map_err(|error| format!("{error:#}"))?;
                let values = value.try_as_plain_ram().and_then(|plain| plain.as_slice::<f32>()).map_err(|error| format!("{error:#}"))?;
                features.push(Features { name: name.clone(), shape: value.shape().to_vec(), values: values.to_vec() });
            }
            Ok(())
        })?;
        Ok(features)
    }
}

struct Compiled {
    plan: Arc<TypedSimplePlan>,
    multiply_adds: u64,
}

fn check_length(input: &[f32], shape: &[usize; 4]) -> Result<(), ModelError> {
    let expected = shape.iter().product();
    if input.len() == expected { Ok(()) } else { Err(ModelError::InputLength { expected, actual: input.len() }) }
}

/// ONNX -> typed graph -> decluttered -> optimised plan, for one float input of `shape`.
fn compile(proto: &pb::ModelProto, shape: &[usize; 4]) -> TractResult<Compiled> {
    let parsed = tract_onnx::onnx().with_ignore_value_info(true).parse(proto, None)?;
    anyhow_ensure(parsed.unresolved_inputs.is_empty(), || format!("these names lead nowhere: {:?}", parsed.unresolved_inputs))?;
    let mut model = parsed.model;
    anyhow_ensure(model.inputs.len() == 1, || format!("it has {} inputs instead of one", model.inputs.len()))?;
    model.set_input_fact(0, f32::fact(shape).into())?;
    let model = model.into_typed()?;
    check_facts(&model)?;
    let model = model.into_decluttered()?;
    check_facts(&model)?;
    let multiply_adds = count_multiply_adds(&model)?;
    let mut model = model;
    model.optimize()?;
    Ok(Compiled { plan: TypedSimplePlan::new(model)?, multiply_adds })
}

fn anyhow_ensure(condition: bool, reason: impl FnOnce() -> String) -> TractResult<()> {
    if condition { Ok(()) } else { Err(TractError::msg(reason())) }
}

/// All shapes are known and none is absurd.
fn check_facts(model: &TypedModel) -> TractResult<()> {
    for node in model.nodes() {
        for output in &node.outputs {
            let elements = concrete_shape(&output.fact)
                .map(|shape| shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64)).unwrap_or(u64::MAX));
            anyhow_ensure(elements.is_none_or(|elements| elements <= MAX_TENSOR_ELEMENTS), || {
                format!("`{}` would make a tensor of {:?}", node.name, output.fact)
            })?;
        }
    }
    for index in 0..model.outputs.len() {
        let fact = model.output_fact(index)?;
        anyhow_ensure(concrete_shape(fact).is_some(), || format!("output {index} has no static shape ({fact:?})"))?;
    }
    Ok(())
}

fn concrete_shape(fact: &TypedFact) -> Option<Vec<usize>> {
    fact.shape.as_concrete().map(<[usize]>::to_vec)
}

fn count_multiply_adds(model: &TypedModel) -> TractResult<u64> {
    let mut sum = TDim::from(0);
    for node in model.nodes() {
        // Element-wise arithmetic is no multiply-add in the sense of the literature.
        let op = node.op.name();
        if !(op.contains("Conv") || op.contains("Deconv") || op.contains("EinSum") || op.contains("MatMul")) {
            continue;
        }
        for (cost, count) in node.op.cost(&model.node_input_facts(node.id)?)? {
            if matches!(cost, Cost::FMA(_)) {
                sum += count;
            }
        }
    }
    Ok(u64::try_from(sum.to_i64()?).unwrap_or(0))
}

/// Run `work`, turning errors and panics into text.
fn guarded<T>(work: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| format!("{error:#}")),
        Err(panic) => Err(format!("the runtime panicked: {}", panic_text(panic.as_ref()))),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// A plan with its state and input buffer.
struct Runner {
    plan: Arc<TypedSimplePlan>,
    /// Made at the first run, and again after a panic left it in an unknown condition.
    state: Option<TypedSimpleState>,
    shape: [usize; 4],
    /// Reused from run to run: the plan gives up its reference when a run ends.
    input: Arc<Tensor>,
}

impl Runner {
    fn new(plan: &Arc<TypedSimplePlan>, shape: &[usize; 4]) -> Self {
        Self { plan: Arc::clone(plan), state: None, shape: *shape, input: Arc::new(Tensor::zero::<f32>(shape).unwrap_or_default()) }
    }

    fn fill(&mut self, values: &[f32]) -> Result<(), ModelError> {
        check_length(values, &self.shape)?;
        let wrong = |error: TractError| ModelError::Inference(format!("{error:#}"));
        if Arc::get_mut(&mut self.input).is_none() {
            // A run that failed half-way may still hold the last one.
            self.input = Arc::new(Tensor::zero::<f32>(&self.shape).map_err(wrong)?);
        }
        if let Some(tensor) = Arc::get_mut(&mut self.input) {
            let mut plain = tensor.try_as_plain_ram_mut().map_err(wrong)?;
            plain.as_slice_mut::<f32>().map_err(wrong)?.copy_from_slice(values);
        }
        Ok(())
    }

    fn run(&mut self, read: impl FnOnce(&[TValue]) -> Result<(), String>) -> Result<(), ModelError> {
        self.attempt(|state, inputs| state.run(inputs)).and_then(|outputs| read(&outputs).map_err(ModelError::Inference))
    }

    fn run_timed(&mut self, times: &mut [Duration]) -> Result<(), ModelError> {
        self.attempt(|state, inputs| {
            state.run_plan_with_eval(inputs, |context, op_state, node, inputs| {
                let started = Instant::now();
                let result = tract_onnx::tract_core::plan::eval(context, op_state, node, inputs);
                if let Some(time) = times.get_mut(node.id) {
                    *time += started.elapsed();
                }
                result
            })
        })
        .map(drop)
    }

    fn attempt(
        &mut self,
        work: impl FnOnce(&mut TypedSimpleState, TVec<TValue>) -> TractResult<TVec<TValue>>,
    ) -> Result<TVec<TValue>, ModelError> {
        let input = TValue::from_const(Arc::clone(&self.input));
        let state = &mut self.state;
        let plan = &self.plan;
        let outcome = guarded(|| {
            let state = match state {
                Some(state) => state,
                None => state.insert(plan.spawn()?),
            };
            work(state, tvec!(input))
        });
        outcome.map_err(|reason| {
            self.state = None;
            ModelError::Inference(reason)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{GRID, INPUT_PX, tiny_bundle, tiny_graph, tiny_meta};
    use proptest::prelude::*;
    use prost::Message;

    fn tiny() -> Model {
        Model::from_bundle(Bundle::from_bytes(&tiny_bundle().unwrap(), Path::new("tiny")).unwrap(), 1).unwrap()
    }

    fn picture(seed: usize) -> Vec<f32> {
        (0..3 * INPUT_PX[0] * INPUT_PX[1]).map(|i| ((i * 7919 + seed * 31) % 512) as f32 / 256.0 - 1.0).collect()
    }

    /// The tiny graph in plain loops.
    fn oracle(input: &[f32]) -> Vec<f32> {
        let graph = tiny_graph().graph.unwrap();
        let weights: Vec<f32> = graph.initializer[0].raw_data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let cell = INPUT_PX[0] / GRID[0];
        let at = |c: usize, y: usize, x: usize| f64::from(input[(c * INPUT_PX[0] + y) * INPUT_PX[1] + x]);
        let norm = |row: usize, col: usize| {
            let channel = |k: usize| {
                let mut sum = 0.0;
                for c in 0..3 {
                    for y in 0..cell {
                        for x in 0..cell {
                            sum += f64::from(weights[((k * 3 + c) * cell + y) * cell + x]) * at(c, row * cell + y, col * cell + x);
                        }
                    }
                }
                sum * sum
            };
            (0..weights.len() / (3 * cell * cell)).map(channel).sum::<f64>().sqrt() as f32
        };
        (0..GRID[0]).flat_map(|row| (0..GRID[1]).map(move |col| norm(row, col))).collect()
    }

    #[test]
    fn inference_equals_plain_loops_and_sessions_are_independent() {
        let model = tiny();
        let (mut first, mut second) = (model.session(), model.session());
        let (mut map, mut other) = (AnomalyMap::default(), AnomalyMap::zeros(GRID));
        for seed in 0..3 {
            first.infer(&picture(seed), &mut map).unwrap();
            second.infer(&picture(seed + 10), &mut other).unwrap();
            assert_eq!([map.grid_rows, map.grid_cols], GRID);
            for (ours, expected) in map.values.iter().zip(oracle(&picture(seed))) {
                assert!((ours - expected).abs() <= 1e-4 * expected.max(1.0), "{ours} against {expected}");
            }
            assert_ne!(map, other);
        }
    }

    #[test]
    fn facts_say_what_the_model_is() {
        let model = tiny();
        let facts = model.facts();
        assert_eq!(facts.input, [1, 3, INPUT_PX[0], INPUT_PX[1]]);
        assert_eq!(facts.grid, GRID);
        assert_eq!(facts.parameters, 4 * 3 * 64);
        assert_eq!(facts.multiply_adds, (4 * 3 * 64 * GRID[0] * GRID[1]) as u64);
        let nodes = model.profile(&picture(0), 2).unwrap();
        assert!(!nodes.is_empty() && nodes.windows(2).all(|pair| pair[0].best_us >= pair[1].best_us));
    }

    #[test]
    fn a_wrong_input_length_is_an_error_and_the_session_stays_usable() {
        let model = tiny();
        let mut session = model.session();
        let mut map = AnomalyMap::default();
        assert!(matches!(session.infer(&[0.0; 5], &mut map), Err(ModelError::InputLength { actual: 5, .. })));
        session.infer(&picture(1), &mut map).unwrap();
        assert_eq!(map.values.len(), GRID[0] * GRID[1]);
    }

    #[test]
    fn values_that_are_not_finite_come_through() {
        let mut session = tiny().session();
        let mut input = picture(1);
        input[17] = f32::NAN;
        let mut map = AnomalyMap::default();
        session.infer(&input, &mut map).unwrap();
        assert!(map.values.iter().any(|value| value.is_nan()), "a NaN must reach the score, which faults");
    }

    #[test]
    fn graphs_that_cannot_run_are_one_clear_error() {
        let refusal = |change: &dyn Fn(&mut pb::GraphProto)| {
            let mut proto = tiny_graph();
            change(proto.graph.as_mut().unwrap());
            let bytes = Bundle::pack(&proto.encode_to_vec(), tiny_meta()).unwrap();
            Model::from_bundle(Bundle::from_bytes(&bytes, Path::new("bad.onnx")).unwrap(), 1).unwrap_err().to_string()
        };
        // The declared output is right, what the graph computes is not: only shape inference can tell.
        let shape = refusal(&|graph| graph.node[0].attribute[1].ints = vec![4, 4]);
        assert!(shape.contains("bad.onnx"), "{shape}");
        let unknown = refusal(&|graph| graph.node[0].op_type = "NoSuchOperator".into());
        assert!(unknown.contains("NoSuchOperator"), "{unknown}");
        let channels = refusal(&|graph| {
            graph.initializer[0].dims = vec![4, 6, 8, 4];
        });
        assert!(channels.contains("bad.onnx"), "{channels}");
        let infinite = refusal(&|graph| {
            graph.node[0].output[0] = "inner".into();
            let log =
                pb::NodeProto { op_type: "Log".into(), input: vec!["inner".into()], output: vec!["features".into()], ..Default::default() };
            graph.node.insert(1, log);
        });
        assert!(infinite.contains("not finite"), "{infinite}");
    }

    #[test]
    fn feature_models_give_all_outputs() {
        let mut proto = tiny_graph();
        let graph = proto.graph.as_mut().unwrap();
        graph.output.insert(0, crate::model::testing::value("features", &[1, 4, GRID[0] as i64, GRID[1] as i64]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backbone.onnx");
        std::fs::write(&path, proto.encode_to_vec()).unwrap();
        let mut model = FeatureModel::load(&path, [3, INPUT_PX[0], INPUT_PX[1]]).unwrap();
        assert_eq!(model.output_names(), ["features", bundle::OUTPUT]);
        assert_eq!(model.output_shapes(), [vec![1, 4, GRID[0], GRID[1]], vec![1, 1, GRID[0], GRID[1]]]);
        let features = model.run(&picture(3)).unwrap();
        assert_eq!(features[0].shape, [1, 4, GRID[0], GRID[1]]);
        for (ours, expected) in features[1].values.iter().zip(oracle(&picture(3))) {
            assert!((ours - expected).abs() <= 1e-4 * expected.max(1.0));
        }
        assert!(FeatureModel::load(&folder.path().join("none.onnx"), [3, 32, 48]).is_err());
        assert!(matches!(model.run(&[]), Err(ModelError::InputLength { .. })));
    }

    #[test]
    fn shared_backbones_load() {
        let shared = std::env::var_os("CULL_SHARED")
            .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../shared").into(), std::path::PathBuf::from);
        let path = shared.join("backbones/efficientnet_lite0_features.onnx");
        if !path.exists() {
            eprintln!("SKIPPED: no backbone at {}", path.display());
            return;
        }
        let mut model = FeatureModel::load(&path, [3, 64, 64]).unwrap();
        let features = model.run(&vec![0.1; 3 * 64 * 64]).unwrap();
        let shapes: Vec<_> = features.iter().map(|f| (f.name.as_str(), f.shape.as_slice())).collect();
        assert!(shapes.contains(&("f2", &[1, 16, 32, 32][..])) && shapes.contains(&("f16", &[1, 112, 4, 4][..])), "{shapes:?}");
        assert!(features.iter().all(|f| f.values.iter().all(|v| v.is_finite())));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Damage that the structural checks let through meets tract: an error or a model, never a panic out of `from_bundle`.
        #[test]
        fn damaged_graphs_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let mut bytes = tiny_graph().encode_to_vec();
            // Behind the weights and in front of them: where the structure is.
            let weights = 4 * 3 * 64 * 4;
            for (index, value) in edits {
                let at = index.index(bytes.len() - weights);
                let at = if at < 200 { at } else { at + weights };
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            if let Ok(bytes) = Bundle::pack(&bytes, tiny_meta()) {
                let _ = Bundle::from_bytes(&bytes, Path::new("damaged")).map(|bundle| Model::from_bundle(bundle, 1));
            }
        }
    }
}
