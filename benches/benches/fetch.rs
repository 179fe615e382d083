//! How fast a model comes from an S3 store, beside `rclone` from the same server in the same run.
//!
//! The server is s3s-fs, with threads of its own in this process. The objects are uploaded in parts by its API, as the
//! stores' own tools upload large ones: the server then keeps their ETags, and does not hash a whole object for each
//! range. Such ETags are no MD5, so that neither side has a checksum of the content to compare with. rclone checks
//! sizes and does not sync; it is timed to its end, and to the end of a sync after it. Pilotlight computes each file's
//! BLAKE3, by which it keeps it, makes the model appear by one rename, and syncs meanwhile; it is timed until the model
//! is there, and until it is settled on the disk. Each fetch is into a fresh folder of one disk, which is compared with
//! the server's files and removed before the next one: whoever comes later would else have less memory that is ready
//! for use. The server's files are in the page cache for both.
//!
//! `MODEL_MIB` is another size than 2048, `ROUNDS` another number of rounds than 6; `rclone` is Debian's.
#![allow(clippy::print_stdout, reason = "its table is what a benchmark is for")]

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use pilotlight_agent::models::{Models, STALL};
use pilotlight_benches::{SHARDS, upload_model};
use pilotlight_tests::s3::{KEY, S3, SECRET};

/// As many streams as Pilotlight has, in the two ways that rclone shares them out.
const FLAGS: [(&str, &[&str]); 2] = [
    (
        "rclone, 4 files x 4 streams",
        &["--transfers", "4", "--multi-thread-streams", "4", "--multi-thread-cutoff", "16M"],
    ),
    (
        "rclone, 4 files x 16 streams",
        &["--transfers", "4", "--multi-thread-streams", "16", "--multi-thread-cutoff", "16M"],
    ),
];

/// Until the model is there, and until it is on the disk.
async fn ours(server: &S3, directory: &Path) -> ([Duration; 2], PathBuf) {
    let models = Models::open(directory.to_owned(), BTreeMap::new(), STALL, None).unwrap();
    let credentials = server.env().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let begun = Instant::now();
    let folder = models.ensure("s3://models/large", &credentials, |_| {}).await.unwrap();
    let there = begun.elapsed();
    let mark = folder.with_file_name("unsettled");
    while mark.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    ([there, begun.elapsed()], folder)
}

/// Until it ends, and until what it wrote is on the disk.
fn rclone(server: &S3, flags: &[&str], directory: &Path) -> [Duration; 2] {
    let mut command = Command::new("rclone");
    // The bucket as a whole: of a folder rclone first asks whether it is an object, to which s3s-fs answers with an error
    // that rclone tries again for most of a minute.
    command.args(["copy", ":s3:models"]).arg(directory);
    command.args(["--s3-provider", "Other", "--s3-endpoint", &server.endpoint(), "--s3-region", "us-east-1"]);
    command.args(["--s3-access-key-id", KEY, "--s3-secret-access-key", SECRET, "--config", "/dev/null"]);
    // It is for all of rclone's connections, and need not exist here.
    command.env_remove("AWS_CA_BUNDLE").args(flags);
    let begun = Instant::now();
    let output = command.output().expect("rclone starts");
    let took = begun.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // What a crash would leave is only then the same.
    assert!(Command::new("sync").arg("--file-system").arg(directory).status().expect("sync starts").success());
    [took, begun.elapsed()]
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

/// What one left to write back must not be on the next one's account.
fn settle() {
    assert!(Command::new("sync").status().expect("sync starts").success());
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}

fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

fn main() {
    let Ok(version) = Command::new("rclone").arg("version").output() else {
        println!("rclone is not installed: there is nothing to compare with (apt install rclone)");
        return;
    };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (mib, rounds) = (from_environment("MODEL_MIB", 2048), from_environment("ROUNDS", 6));
    let bytes = (mib << 20) / SHARDS;
    // By these names a profiler tells the two sides apart.
    let named =
        |name: &str| tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(name).build().unwrap();
    let (serving, runtime) = (named("server"), named("client"));
    let server = serving.block_on(S3::start());
    runtime.block_on(upload_model(&server, bytes));
    let mut own = [Vec::new(), Vec::new()];
    let mut others = FLAGS.map(|_| [Vec::new(), Vec::new()]);
    for round in 0..rounds as usize {
        print!("round {round}:");
        // Each is first, and last, as often as the others.
        for turn in 0..=FLAGS.len() {
            settle();
            let fresh = tempfile::tempdir().unwrap();
            let (name, times, [ended, synced], folder) = match (turn + round) % (FLAGS.len() + 1) {
                0 => {
                    let (took, folder) = runtime.block_on(ours(&server, fresh.path()));
                    ("pilotlight", &mut own, took, folder)
                }
                number => {
                    let took = rclone(&server, FLAGS[number - 1].1, fresh.path());
                    ("rclone", &mut others[number - 1], took, fresh.path().join("large"))
                }
            };
            print!(" {name} {ended:.2?} and synced {synced:.2?},");
            times[0].push(ended);
            times[1].push(synced);
            check(&server, &folder, bytes);
        }
        println!();
    }
    println!("\n{}", String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default());
    println!("{mib} MiB in {SHARDS} files from s3s-fs on loopback, median of {rounds} interleaved rounds:\n");
    println!("| | s | MiB/s | Pilotlight's rate over it | synced, s | Pilotlight's rate over it |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    let base = own.each_ref().map(|times| median(times).as_secs_f64());
    let rate = |seconds: f64| mib as f64 / seconds;
    println!("| Pilotlight | {:.2} | {:.0} | | {:.2} | |", base[0], rate(base[0]), base[1]);
    for ((name, _), both) in FLAGS.iter().zip(&others) {
        let [ended, synced] = both.each_ref().map(|times| median(times).as_secs_f64());
        let over = [ended / base[0], synced / base[1]];
        println!("| {name} | {ended:.2} | {:.0} | {:.2} | {synced:.2} | {:.2} |", rate(ended), over[0], over[1]);
    }
}
