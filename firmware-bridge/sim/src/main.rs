//! The simulated board alone: `firmware-bridge-sim ['{"gate_ms": 200, …}']`, the fields of [`firmware_bridge_sim::SimConfig`].
use std::process::ExitCode;

fn main() -> ExitCode {
    let text = std::env::args().nth(1).unwrap_or_else(|| "{}".into());
    let result = serde_json::from_str(&text)
        .map_err(|error| format!("configuration {text}: {error}"))
        .and_then(|config| firmware_bridge_sim::run(config).map_err(|error| error.to_string()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("firmware-bridge-sim: {message}");
            ExitCode::FAILURE
        }
    }
}
