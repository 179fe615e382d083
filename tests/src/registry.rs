//! A registry of images: Debian's `docker-registry`, on a loopback port and a directory of its own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;
use tempfile::TempDir;

use crate::{
    container::{docker, image, left_out},
    eventually,
    http::Gateway,
    process::Process,
    relay::Relay,
};

/// The one user of a registry that asks for one.
pub const USER: &str = "pilotlight";
/// The user's password.
pub const PASSWORD: &str = "not-a-real-password";
/// The two as `htpasswd -B` writes them.
const HTPASSWD: &str = "pilotlight:$2b$05$abcdefghijklmnopqrstuudLYPY/O3Omal5/C.k5.n2dNOG5VmjFK\n";

/// A running registry, reached through a relay. Ends with the value, and all its images on this machine go.
#[derive(Debug)]
pub struct Registry {
    directory: TempDir,
    /// The port that images bear in their names.
    port: u16,
    relay: Option<Relay>,
    _process: Process,
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// `127.0.0.1:port/name:tag`.
    pub tag: String,
    /// `127.0.0.1:port/name@sha256:…`.
    pub digest: String,
}

impl Registry {
    /// Starts one that gives its images to everybody. `None` where there is no Docker Engine or no registry,
    /// which is said: then the caller leaves its test out, unless `PILOTLIGHT_REQUIRE_DOCKER` is set.
    ///
    /// # Panics
    /// It does not start, or the variable is set and something is missing.
    pub async fn start() -> Option<Self> {
        Self::with(false).await
    }

    /// Starts one that asks for [`USER`] and [`PASSWORD`].
    ///
    /// # Panics
    /// As [`Self::start`].
    pub async fn start_with_login() -> Option<Self> {
        Self::with(true).await
    }

    async fn with(login: bool) -> Option<Self> {
        image()?;
        let program = binary()?;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let port = crate::free_port();
        let path = |name: &str| directory.path().join(name);
        let mut config = json!({
            "version": "0.1",
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": path("images")}},
            "http": {"addr": format!("127.0.0.1:{port}"), "secret": "tests"},
        });
        if login {
            config["auth"] = json!({"htpasswd": {"realm": "tests", "path": path("htpasswd")}});
        }
        let write = |name: &str, text: &str| fs::write(path(name), text).expect("can be written");
        write("config.yml", &config.to_string());
        write("htpasswd", HTPASSWD);
        let arguments = [Path::new("serve"), &path("config.yml")];
        let process = Process::start(&program, directory.path(), "registry", arguments, &[]);
        let gateway = Gateway::at(port);
        eventually("the registry answers", || async { gateway.get("127.0.0.1", "/v2/").await.ok() }).await;
        let relay = Relay::before(port).await;
        let registry = Self { port: relay.port(), relay: Some(relay), _process: process, directory };
        // As Docker's client looks for it.
        fs::write(registry.directory.path().join("config.json"), registry.docker_config()).expect("can be written");
        Some(registry)
    }

    /// `127.0.0.1:port`, as in images' names.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The relay before it.
    ///
    /// # Panics
    /// It was stopped.
    pub fn relay(&self) -> &Relay {
        self.relay.as_ref().expect("the registry was not stopped")
    }

    /// From now on nothing listens there.
    pub fn stop(&mut self) {
        self.relay = None;
    }

    /// What `docker login` would write: credentials for this registry.
    pub fn docker_config(&self) -> String {
        json!({"auths": {self.host(): {"username": USER, "password": PASSWORD}}}).to_string()
    }

    /// Pushes an image of this machine under a name, `name:tag`. The image stays here by its own name alone.
    ///
    /// # Panics
    /// It cannot be pushed.
    pub fn push(&self, local: &str, name: &str) -> Pushed {
        let tag = format!("{}/{name}", self.host());
        let must = |args: &[&str]| {
            let (succeeded, said) = docker(args);
            assert!(succeeded, "{args:?}: {said}");
            said
        };
        must(&["tag", local, &tag]);
        let config = self.directory.path().display().to_string();
        let said = must(&["--config", &config, "push", &tag]);
        must(&["rmi", &tag]);
        let digest = said.split_whitespace().skip_while(|word| *word != "digest:").nth(1);
        let digest = digest.unwrap_or_else(|| panic!("no digest in {said}"));
        let repository = tag.rsplit_once(':').map_or(tag.as_str(), |(repository, _)| repository);
        Pushed { digest: format!("{repository}@{digest}"), tag }
    }

    /// Removes all its images from this machine.
    pub fn remove_local(&self) {
        let pattern = format!("reference={}/*", self.host());
        let format = "{{.Repository}} {{.Tag}} {{.Digest}}";
        let (_, said) = docker(&["images", "--digests", "--format", format, "--filter", &pattern]);
        for line in said.lines() {
            let [repository, tag, digest] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
            // Where the last name of an image goes, those of its digest go with it.
            if tag != "<none>" {
                docker(&["rmi", &format!("{repository}:{tag}")]);
            }
            if digest != "<none>" {
                docker(&["rmi", &format!("{repository}@{digest}")]);
            }
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.remove_local();
    }
}

/// The program, where it is installed.
fn binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join("docker-registry"));
    let found = found.into_iter().find(|file: &PathBuf| Path::is_file(file));
    if found.is_none() {
        left_out("there is no docker-registry", "pulls");
    }
    found
}
