//! The token that `pilotlight dev` requires: made by `dev`, found by the other commands.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use pilotlight_identity::Trust;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// Name of the token's file below `dev`'s data directory.
const TOKEN_FILE: &str = "token";
/// `dev`'s data directory unless asked for otherwise.
const DEFAULT_DATA_DIR: &str = ".pilotlight";

/// Where a running `dev` keeps its token; removed when it ends.
pub struct DevRecord(Option<PathBuf>);

#[derive(Serialize, Deserialize)]
struct Record {
    /// Address of its gRPC listener.
    server: String,
    token_file: PathBuf,
}

/// Makes a new token, writes it below `data_dir`, and records where, so that commands of the same user find it.
pub fn create(data_dir: &Path, listen: SocketAddr) -> anyhow::Result<(String, DevRecord)> {
    let token = pilotlight_identity::random_token()?;
    let token_file = data_dir.join(TOKEN_FILE);
    write_private(&token_file, token.as_bytes())?;
    let server = server_url(listen);
    let record = state_dir().map(|directory| directory.join(record_name(listen.port())));
    let recorded = record.clone().and_then(|path| {
        let record = serde_json::to_vec(&Record { server, token_file }).ok()?;
        let written = pilotlight_identity::private_dir(path.parent()?).map_err(anyhow::Error::from);
        match written.and_then(|()| write_private(&path, &record)) {
            Ok(()) => Some(path),
            Err(error) => {
                warn!(%error, "commands find the token of this dev only in this directory, or by --token-file");
                None
            }
        }
    });
    Ok((token, DevRecord(recorded)))
}

impl Drop for DevRecord {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Whoever removed it before did the same.
            let _ = fs::remove_file(path);
        }
    }
}

/// How to call `server` without a certificate: with `dev`'s token if there is one for it. A token is sent to this
/// machine's loopback alone, unless its file is named.
pub fn trust(server: &str, token_file: Option<&Path>) -> anyhow::Result<Trust> {
    if let Some(file) = token_file {
        let token = fs::read_to_string(file).with_context(|| format!("token-file: {}", file.display()))?;
        return Ok(Trust::Bearer(token.trim().to_owned()));
    }
    let Some(address) = loopback(server) else { return Ok(Trust::Plaintext) };
    let recorded = state_dir().and_then(|directory| recorded(&directory, address));
    let file = recorded.unwrap_or_else(|| Path::new(DEFAULT_DATA_DIR).join(TOKEN_FILE));
    Ok(match fs::read_to_string(file) {
        Ok(token) => Trust::Bearer(token.trim().to_owned()),
        // The server says what it needs.
        Err(_) => Trust::Plaintext,
    })
}

fn recorded(directory: &Path, address: SocketAddr) -> Option<PathBuf> {
    let record = fs::read(directory.join(record_name(address.port()))).ok()?;
    let record: Record = serde_json::from_slice(&record).ok()?;
    (loopback(&record.server)? == address).then_some(record.token_file)
}

/// The address of `http://host:port`, if it is on this machine's loopback.
fn loopback(server: &str) -> Option<SocketAddr> {
    let authority = server.strip_prefix("http://")?.trim_end_matches('/');
    let authority = authority.replace("localhost", "127.0.0.1");
    authority.parse().ok().filter(|address: &SocketAddr| address.ip().is_loopback())
}

fn server_url(listen: SocketAddr) -> String {
    format!("http://{listen}")
}

fn record_name(port: u16) -> String {
    format!("dev-{port}.json")
}

fn state_dir() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let base = runtime.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")));
    base.map(|directory| directory.join("pilotlight"))
}

/// Writes a file with mode 0600, whole or not at all.
fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(content)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_to_loopback_alone() {
        let here = "127.0.0.1:7443".parse().ok();
        assert_eq!(loopback("http://127.0.0.1:7443"), here);
        assert_eq!(loopback("http://localhost:7443/"), here);
        for elsewhere in ["http://10.0.0.1:7443", "https://127.0.0.1:7443", "http://localhost.example.com:7443", "x"] {
            assert_eq!(loopback(elsewhere), None, "{elsewhere}");
        }
    }

    #[test]
    fn a_running_dev_is_found_by_its_address() {
        let directory = tempfile::tempdir().unwrap();
        let listen: SocketAddr = "127.0.0.1:7000".parse().unwrap();
        let token_file = directory.path().join("token");
        let record = Record { server: server_url(listen), token_file: token_file.clone() };
        write_private(&directory.path().join(record_name(7000)), &serde_json::to_vec(&record).unwrap()).unwrap();
        assert_eq!(recorded(directory.path(), listen), Some(token_file));
        assert_eq!(recorded(directory.path(), "127.0.0.1:7001".parse().unwrap()), None);
        assert_eq!(recorded(directory.path(), "127.0.0.2:7000".parse().unwrap()), None);
    }

    #[test]
    fn a_named_token_file_must_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        assert!(trust("http://127.0.0.1:1", Some(&file)).unwrap_err().to_string().contains("token-file"));
        write_private(&file, b"secret\n").unwrap();
        assert!(matches!(trust("http://127.0.0.1:1", Some(&file)), Ok(Trust::Bearer(token)) if token == "secret"));
    }
}
