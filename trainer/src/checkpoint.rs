//! Checkpoints: one safetensors file with weights, optimiser moments, averages and the plan, written to a temporary name and renamed, so that a
//! crash leaves the last good one.

use crate::optimiser::Optimiser;
use crate::train::{Plan, State};
use crate::uniad::{Leaf, Weights, host};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// Version of the file's own layout. 2: may hold the best validated weights.
const FORMAT: u32 = 2;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Reading or writing failed.
    #[error("checkpoint {path}: {why}")]
    File {
        /// File.
        path: String,
        /// Cause, and what to do.
        why: String,
    },
    /// It belongs to another run.
    #[error("checkpoint {path} was made with other settings ({field} differs): resume with the same arguments, or start without --resume")]
    OtherPlan {
        /// File.
        path: String,
        /// First part that differs.
        field: &'static str,
    },
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    plan: Plan,
    step: usize,
    optimiser_steps: usize,
    losses: Vec<f32>,
    validations: Vec<(usize, f64)>,
    has_best: bool,
}

/// Write `state`; an existing file is replaced only when the new one is complete on disk.
///
/// # Errors
/// When the file cannot be written (full disk, no permission).
pub fn save(path: &Path, plan: &Plan, state: &State) -> Result<(), CheckpointError> {
    let fail = |why: String| CheckpointError::File { path: path.display().to_string(), why };
    let header = Header {
        format: FORMAT,
        plan: plan.clone(),
        step: state.step,
        optimiser_steps: state.optimiser.steps,
        losses: state.losses.clone(),
        validations: state.validations.clone(),
        has_best: state.best.is_some(),
    };
    let header = serde_json::to_string(&header).map_err(|e| fail(e.to_string()))?;
    let mut buffers: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut push = |prefix: &str, list: &[Tensor<2>]| {
        for ((name, _), value) in state.weights.layout.iter().zip(list) {
            let dims = value.dims().to_vec();
            let bytes = host(value.clone().inner_if_needed()).iter().flat_map(|v| v.to_le_bytes()).collect();
            buffers.push((format!("{prefix}.{name}"), dims, bytes));
        }
    };
    push("weight", &state.weights.values);
    push("moment_1", &state.optimiser.moment_1);
    push("moment_2", &state.optimiser.moment_2);
    if let Some(ema) = &state.ema {
        push("ema", ema);
    }
    if let Some(best) = &state.best {
        push("best", best);
    }
    let mut views = Vec::with_capacity(buffers.len());
    for (name, dims, bytes) in &buffers {
        views.push((name.clone(), TensorView::new(Dtype::F32, dims.clone(), bytes).map_err(|e| fail(e.to_string()))?));
    }
    let bytes = serialize(views, Some(HashMap::from([("cull".to_owned(), header)]))).map_err(|e| fail(e.to_string()))?;
    write_whole(path, &bytes).map_err(|e| fail(format!("cannot be written ({e}); free some space or choose another --checkpoint")))
}

/// Write a checkpoint of the kind `kind` (its key in the file): a header and lists of numbers. An existing file is replaced only when the new one is
/// complete on disk.
///
/// # Errors
/// When the file cannot be written (full disk, no permission).
pub fn save_lists(path: &Path, kind: &str, header: &impl Serialize, lists: &[(&str, &[f32])]) -> Result<(), CheckpointError> {
    let fail = |why: String| CheckpointError::File { path: path.display().to_string(), why };
    let header = serde_json::to_string(header).map_err(|e| fail(e.to_string()))?;
    let bytes = |list: &[f32]| -> Vec<u8> { list.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let buffers: Vec<(&str, usize, Vec<u8>)> = lists.iter().map(|(name, list)| (*name, list.len(), bytes(list))).collect();
    let mut views = Vec::with_capacity(buffers.len());
    for (name, len, data) in &buffers {
        views.push((*name, TensorView::new(Dtype::F32, vec![*len], data).map_err(|e| fail(e.to_string()))?));
    }
    let file = serialize(views, Some(HashMap::from([(kind.to_owned(), header)]))).map_err(|e| fail(e.to_string()))?;
    write_whole(path, &file).map_err(|e| fail(format!("cannot be written ({e}); free some space or choose another --out")))
}

/// A checkpoint that [`save_lists`] wrote.
pub struct Lists<H> {
    /// Its header.
    pub header: H,
    path: String,
    bytes: Vec<u8>,
}

impl<H: DeserializeOwned> Lists<H> {
    /// Read a checkpoint of this `kind`.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged or of another kind.
    pub fn read(path: &Path, kind: &str) -> Result<Self, CheckpointError> {
        let fail = |why: String| CheckpointError::File { path: path.display().to_string(), why };
        let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read ({e}); start without --resume")))?;
        let damaged = |e: String| fail(format!("is damaged ({e}); start without --resume"));
        let (_, meta) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let text = meta.metadata().as_ref().and_then(|m| m.get(kind)).ok_or_else(|| fail("is no checkpoint of this command".into()))?;
        let header = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
        // The whole file's layout, before anything is taken from it.
        SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
        Ok(Self { header, path: path.display().to_string(), bytes })
    }

    /// The list `name`, of `len` numbers.
    ///
    /// # Errors
    /// When it is not there or has another length.
    pub fn list(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let damaged =
            |e: String| CheckpointError::File { path: self.path.clone(), why: format!("is damaged ({e}); start without --resume") };
        let file = SafeTensors::deserialize(&self.bytes).map_err(|e| damaged(e.to_string()))?;
        let view = file.tensor(name).map_err(|e| damaged(e.to_string()))?;
        if view.shape() != [len] || view.dtype() != Dtype::F32 {
            return Err(damaged(format!("{name} has another shape")));
        }
        Ok(view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// The error of a checkpoint that belongs to another run, of which `field` differs.
    pub fn of_another_run(&self, field: &'static str) -> CheckpointError {
        CheckpointError::OtherPlan { path: self.path.clone(), field }
    }
}

/// Write a file so that a crash or a full disk leaves either the old one or the new one.
///
/// # Errors
/// Whatever the file system says.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".part");
    let temporary = std::path::PathBuf::from(temporary);
    let result = (|| {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if result.is_err() {
        // The half-written file is of no use to anybody; failing to remove it changes nothing about the error already reported.
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

/// Read a checkpoint made with the same plan.
///
/// # Errors
/// When the file cannot be read, is damaged, or was made with another plan.
pub fn load(path: &Path, plan: &Plan, device: &Device) -> Result<State, CheckpointError> {
    let fail = |why: String| CheckpointError::File { path: path.display().to_string(), why };
    let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read ({e})")))?;
    let (_, meta) = SafeTensors::read_metadata(&bytes).map_err(|e| fail(format!("is damaged ({e}); start without --resume")))?;
    let text = meta.metadata().as_ref().and_then(|m| m.get("cull")).ok_or_else(|| fail("is no checkpoint of this trainer".into()))?;
    let header: Header = serde_json::from_str(text).map_err(|e| fail(format!("is damaged ({e}); start without --resume")))?;
    if header.format != FORMAT {
        return Err(fail(format!("has format {}, this trainer reads {FORMAT}", header.format)));
    }
    let other = |field| CheckpointError::OtherPlan { path: path.display().to_string(), field };
    let was = &header.plan;
    match () {
        () if was.model != plan.model => return Err(other("the model")),
        () if was.loss != plan.loss => return Err(other("the loss")),
        () if was.optimiser != plan.optimiser => return Err(other("the optimiser")),
        () if was.batch != plan.batch => return Err(other("the batch")),
        () if was.steps != plan.steps => return Err(other("the number of steps")),
        () if was.seed != plan.seed || was.ema != plan.ema => return Err(other("the seed or averaging")),
        () => {}
    }
    // The rate alone may change: after a divergence, going on with a lower one is the point of resuming.
    let mut schedule = was.schedule.clone();
    schedule.set_rate(plan.schedule.top_rate());
    if schedule != plan.schedule {
        return Err(other("the schedule"));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(format!("is damaged ({e}); start without --resume")))?;
    let layout = plan.model.layout();
    let list = |prefix: &str| -> Result<Vec<Tensor<2>>, CheckpointError> {
        layout
            .iter()
            .map(|(name, kind)| {
                let view = file.tensor(&format!("{prefix}.{name}")).map_err(|_| fail(format!("lacks {prefix}.{name}")))?;
                if view.shape() != kind.shape() || view.dtype() != Dtype::F32 {
                    return Err(fail(format!("holds {prefix}.{name} with another shape")));
                }
                let data: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                Ok(Tensor::from_data(TensorData::new(data, kind.shape()), device))
            })
            .collect()
    };
    let mut optimiser = Optimiser::new(plan.optimiser.clone());
    optimiser.steps = header.optimiser_steps;
    if optimiser.steps > 0 {
        optimiser.moment_1 = list("moment_1")?;
        optimiser.moment_2 = list("moment_2")?;
    }
    let weights = Weights::new(layout.clone(), list("weight")?);
    let ema = if plan.ema > 0.0 { Some(list("ema")?) } else { None };
    let best = if header.has_best { Some(list("best")?) } else { None };
    Ok(State { weights, optimiser, ema, step: header.step, losses: header.losses, validations: header.validations, best })
}
