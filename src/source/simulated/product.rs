//! What a rendered product is: a way to assemble one part on the texture, good or with a defect.

use super::canvas::{Area, Px};
use super::defect::{DefectKind, Draw};
use super::math::Rng;
use super::optics::Setup;

/// A product of the simulated line. Textures are made once, by its constructor, from constants alone: the product is the same for
/// every seed; only its parts differ.
pub(super) trait Product: Send + Sync {
    /// Folder name of the product.
    fn name(&self) -> &'static str;

    /// How much pose and light vary.
    fn setup(&self) -> Setup;

    /// The defects that this product can have.
    fn defects(&self) -> &'static [DefectKind];

    /// Assemble a part on the whole texture. `rng` decides everything that differs between good parts; the same `rng` with a `defect`
    /// gives the same part with that defect and nothing else changed. Returns what the defect may have touched (empty for none).
    fn assemble(&self, rng: Rng, defect: Option<&mut Draw>, texture: &mut [Px]) -> Area;
}
