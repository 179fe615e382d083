//! An image for tests of containers: one static program in an otherwise empty image, since none can be pulled.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// The image's name; its entry point is `/server`.
pub const IMAGE: &str = "pilotlight-conformance:test";

/// The program in the image, `container/server.rs`: static, so that it runs there as well as on the host.
///
/// # Panics
/// It cannot be built.
pub fn server() -> &'static Path {
    static SERVER: OnceLock<PathBuf> = OnceLock::new();
    SERVER.get_or_init(|| {
        // target/<profile>/deps/<test>; several tests may build it at once, so each does so for itself.
        let test = std::env::current_exe().expect("this test's own path");
        let path = test.with_extension("server");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/container/server.rs");
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let mut command = Command::new(rustc);
        command.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", source, "-o"]).arg(&path);
        assert!(command.status().expect("rustc").success(), "{source} cannot be built");
        path
    })
}

/// Builds the image; `None` where no Docker Engine answers, which is said. Then the caller leaves its test
/// out, unless `PILOTLIGHT_REQUIRE_DOCKER` is set.
///
/// # Panics
/// The image cannot be built, or the variable is set and no engine answers.
pub fn image() -> Option<&'static str> {
    static BUILT: OnceLock<bool> = OnceLock::new();
    let built = *BUILT.get_or_init(|| {
        if !docker(&["version"]).0 {
            left_out("no Docker Engine answers", "containers");
            return false;
        }
        // Made anew only where the program is another: others may run from it, and it stays when tests end.
        let (made, of) = docker(&["inspect", "--format", "{{index .Config.Labels \"source\"}}", IMAGE]);
        if !(made && of.trim() == source_hash()) {
            build(IMAGE, &[]);
        }
        true
    });
    built.then_some(IMAGE)
}

/// Says what is left out, and why.
///
/// # Panics
/// `PILOTLIGHT_REQUIRE_DOCKER` is set: then nothing may be left out.
pub fn left_out(why: &str, what: &str) {
    let required = std::env::var_os("PILOTLIGHT_REQUIRE_DOCKER").is_some();
    assert!(!required, "PILOTLIGHT_REQUIRE_DOCKER is set, and {why}");
    eprintln!("LEFT OUT: {why}, so that nothing is known of {what}");
}

/// What the program is made of.
fn source_hash() -> String {
    let mut hasher = DefaultHasher::new();
    include_str!("container/server.rs").hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Builds the image under another name, with a file `/extra` of these bytes in its one layer.
///
/// # Panics
/// It cannot be built.
pub fn build(name: &str, extra: &[u8]) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let folder = directory.path().display().to_string();
    fs::copy(server(), directory.path().join("server")).expect("can be copied");
    fs::write(directory.path().join("extra"), extra).expect("can be written");
    let archive = format!("{folder}/image.tar");
    let tar = Command::new("tar").args(["-cf", &archive, "-C", &folder, "server", "extra"]).status().expect("tar");
    assert!(tar.success(), "the archive cannot be made");
    let label = format!("LABEL source={}", source_hash());
    let (imported, said) = docker(&["import", "-c", "ENTRYPOINT [\"/server\"]", "-c", &label, &archive, name]);
    assert!(imported, "{said}");
}

/// Bytes that no compression makes fewer, others at each call.
pub fn noise(bytes: usize) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Marsaglia's xorshift; the seed must not be 0.
    let mut state = (u64::from(std::process::id()) << 32) + NEXT.fetch_add(1, Ordering::Relaxed);
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_ne_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Containers, ended ones too, that bear this label.
pub fn labelled(label: &str) -> Vec<String> {
    let (_, said) = docker(&["ps", "-aq", "--filter", &format!("label={label}")]);
    said.lines().map(str::to_owned).collect()
}

/// Runs a command of Docker's client: whether it succeeded, and what it said.
pub fn docker(args: &[&str]) -> (bool, String) {
    let Ok(output) = Command::new("docker").args(args).output() else { return (false, "there is no docker".into()) };
    let said = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}
