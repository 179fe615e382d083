//! Processes that a story starts. Each ends with the story, however that ends.

use std::{
    ffi::OsStr,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The `pilotlight` binary, built once per test binary; or the one that `PILOTLIGHT_TEST_BINARY` names, so
/// that a script that has just built it need not build it again with other features.
///
/// # Panics
/// It cannot be built.
pub fn pilotlight() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(given) = std::env::var_os("PILOTLIGHT_TEST_BINARY") {
            return PathBuf::from(given);
        }
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "pilotlight", "--bin", "pilotlight"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .expect("cargo runs");
        assert!(status.success(), "pilotlight must build");
        // target/<profile>/deps/<test> → target/<profile>/pilotlight
        let test = std::env::current_exe().expect("a test knows its path");
        let profile = test.ancestors().nth(2).expect("tests lie two levels below target/<profile>");
        profile.join("pilotlight")
    })
}

/// A running process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts a program with its output in `<directory>/<name>.log`.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start<A: AsRef<OsStr>>(
        program: &Path,
        directory: &Path,
        name: &str,
        args: impl IntoIterator<Item = A>,
        env: &[(&str, String)],
    ) -> Self {
        let log = directory.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("the log can be written");
        let child = Command::new(program)
            .args(args)
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a file can be cloned"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        Self { child, name: name.to_owned(), log }
    }

    /// As a crash would: no signal handler runs.
    ///
    /// # Panics
    /// The process cannot be waited for.
    pub fn kill_9(mut self) {
        self.child.kill().expect("can be killed");
        self.child.wait().expect("can be waited for");
    }

    /// As an operator would: SIGTERM, and then its exit.
    ///
    /// # Panics
    /// The process is gone already.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).expect("can be signalled");
        self.child.wait().expect("can be waited for")
    }

    /// It does nothing any more, and keeps its connections: SIGSTOP.
    ///
    /// # Panics
    /// The process is gone already.
    pub fn freeze(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGSTOP).expect("can be signalled");
    }

    /// It goes on: SIGCONT.
    ///
    /// # Panics
    /// The process is gone already.
    pub fn thaw(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGCONT).expect("can be signalled");
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Bytes that it has in main memory.
    ///
    /// # Panics
    /// It does not run any more.
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux has it");
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kibibytes << 10
    }

    /// True while it runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("──── {} ────\n{}", self.name, self.log());
        }
    }
}

/// Runs a program to its end.
///
/// # Panics
/// It cannot be started.
pub fn output<A: AsRef<OsStr>>(program: &Path, args: impl IntoIterator<Item = A>) -> Output {
    Command::new(program)
        .args(args)
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}
