//! What a training folder holds: MVTec-AD layout, one folder per product, or one mixed folder. Knows file names only, never pixels.

use cull::dataset::{Dataset, Split};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Fewer normal images than this cannot train and calibrate anything.
pub const MIN_IMAGES: usize = 20;
/// Of the normal images of a product, one in this many is kept out of training for the calibration.
const HELD_OUT_ONE_IN: usize = 7;
/// Held-out images wanted of a small product: fewer cannot be calibrated.
const HELD_OUT_AT_LEAST: usize = 5;

/// Images of a training folder.
#[derive(Clone, Debug, Default)]
pub struct TrainingSet {
    /// Normal images to train on.
    pub train: Vec<PathBuf>,
    /// Normal images kept out, for the calibration.
    pub held_out: Vec<PathBuf>,
    /// Test images with their category and defect (`None` for good), where the folder has them.
    pub test: Vec<TestImage>,
    /// Product names found; `trained_on` in the bundle. Never used in training.
    pub products: Vec<String>,
}

/// One labelled image.
#[derive(Clone, Debug)]
pub struct TestImage {
    /// File.
    pub path: PathBuf,
    /// Category (product).
    pub category: String,
    /// Defect, `None` for a good part.
    pub defect: Option<String>,
    /// Mask file.
    pub mask: Option<PathBuf>,
}

/// Why a folder cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The folder cannot be read or has no pictures.
    #[error("{0}")]
    Folder(String),
    /// Too few.
    #[error("{path} holds {found} normal images, at least {MIN_IMAGES} are needed: collect more good parts (`cull collect`)")]
    TooFew {
        /// Folder.
        path: String,
        /// Normal images found.
        found: usize,
    },
    /// Test defects among the training images.
    #[error("{image} is in the training set and, with the same content, in the test set at {test}: take it out of one of them")]
    MixedUp {
        /// Training image.
        image: String,
        /// Test image.
        test: String,
    },
    /// A folder that looks like defects in train.
    #[error("{0} lies under train/ but is not called good: only normal parts may be trained on; move it to test/")]
    DefectInTrain(String),
}

impl TrainingSet {
    /// Find the images of `dir`. Which images are held out depends on their order alone, so it is the same on every machine.
    ///
    /// # Errors
    /// When the folder has no pictures, too few, or defects in train.
    pub fn scan(dir: &Path) -> Result<Self, DataError> {
        let mut by_product: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        let mut test = Vec::new();
        for item in Dataset::scan(dir).map_err(|e| DataError::Folder(e.to_string()))?.items {
            match (item.split, &item.defect) {
                (Split::Train, None) => by_product.entry(item.category).or_default().push(item.path),
                (Split::Train, Some(_)) => return Err(DataError::DefectInTrain(item.path.display().to_string())),
                (Split::Test, _) => {
                    test.push(TestImage { path: item.path, category: item.category, defect: item.defect, mask: item.mask });
                }
            }
        }
        let mut out = Self { test, products: by_product.keys().cloned().collect(), ..Self::default() };
        for pictures in by_product.into_values() {
            // Every k-th image, so that a drift over the shift is in both parts.
            let every = (pictures.len() / HELD_OUT_AT_LEAST).clamp(2, HELD_OUT_ONE_IN);
            for (i, path) in pictures.into_iter().enumerate() {
                if i % every == every / 2 { out.held_out.push(path) } else { out.train.push(path) }
            }
        }
        let found = out.train.len() + out.held_out.len();
        if found < MIN_IMAGES {
            return Err(DataError::TooFew { path: dir.display().to_string(), found });
        }
        Ok(out)
    }

    /// Refuse a set whose training images are also test defects, byte for byte.
    ///
    /// # Errors
    /// [`DataError::MixedUp`] naming the first pair.
    pub fn check_not_mixed_up(&self) -> Result<(), DataError> {
        use sha2::{Digest, Sha256};
        let digest = |path: &Path| std::fs::read(path).ok().map(|b| Sha256::digest(b));
        // Unreadable files are found, named and counted by the feature extraction.
        let defects: BTreeMap<_, &TestImage> =
            self.test.iter().filter(|t| t.defect.is_some()).filter_map(|t| Some((digest(&t.path)?, t))).collect();
        if defects.is_empty() {
            return Ok(());
        }
        for path in self.train.iter().chain(&self.held_out) {
            if let Some(test) = digest(path).and_then(|d| defects.get(&d)) {
                return Err(DataError::MixedUp { image: path.display().to_string(), test: test.path.display().to_string() });
            }
        }
        Ok(())
    }
}
