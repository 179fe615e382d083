//! Runs commands in containers.

use bollard::{
    Docker,
    container::LogOutput,
    errors::Error,
    exec::{CreateExecOptions, StartExecResults},
};
use futures::StreamExt as _;

use super::Running;

/// Runs a command in the replica's container, and waits for its end.
///
/// # Errors
/// It did not end with 0: its exit code, and the beginning of what it printed.
pub(super) async fn exec(docker: &Docker, running: &Running, command: &[String]) -> Result<(), String> {
    let program = command.first().ok_or("no command")?;
    let id = running.container.as_deref().ok_or("no container")?;
    let failed = |error: Error| format!("{program}: {error}");
    let options = CreateExecOptions {
        cmd: Some(command.to_vec()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        ..CreateExecOptions::default()
    };
    let exec = docker.create_exec(id, options).await.map_err(failed)?.id;
    let mut said = Vec::new();
    if let StartExecResults::Attached { mut output, .. } = docker.start_exec(&exec, None).await.map_err(failed)? {
        while let Some(chunk) = output.next().await {
            let chunk = chunk.map(LogOutput::into_bytes).map_err(failed)?;
            // The beginning says what is wrong.
            said.extend_from_slice(&chunk[..chunk.len().min(256_usize.saturating_sub(said.len()))]);
        }
    }
    match docker.inspect_exec(&exec).await.map_err(failed)?.exit_code {
        Some(0) => Ok(()),
        code => Err(format!("{program}: exit code {}: {}", code.unwrap_or(-1), String::from_utf8_lossy(&said).trim())),
    }
}
