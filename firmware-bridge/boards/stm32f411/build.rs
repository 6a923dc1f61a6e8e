//! Linker arguments; the memory layout comes from embassy-stm32 (`memory-x`).
fn main() {
    for argument in ["--nmagic", "-Tlink.x"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
