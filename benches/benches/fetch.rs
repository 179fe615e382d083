//! How fast a model comes from an S3 store, beside `rclone` from the same server in the same run.
//!
//! The server is s3s-fs in this process. Ours has done more by the end: each byte is hashed, the files are on the disk
//! (fsync), and the model appears whole by one rename. Set `MODEL_MIB` for another size than 2 GiB; `rclone` is
//! Debian's.
#![allow(clippy::print_stdout, reason = "its table is what a benchmark is for")]

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use pilotlight_agent::models::{Models, STALL};
use pilotlight_tests::s3::{KEY, S3, SECRET};

/// Files of the model, as the shards of a large one.
const FILES: u64 = 4;
const ROUNDS: usize = 3;

/// A file of bytes that do not repeat.
fn fill(path: &Path, bytes: u64) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut file = File::create(path).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ bytes ^ path.as_os_str().len() as u64;
    let mut block = vec![0_u8; 1 << 20];
    for _ in 0..bytes >> 20 {
        for word in block.chunks_exact_mut(8) {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
}

async fn ours(server: &S3) -> Duration {
    let directory = tempfile::tempdir().unwrap();
    let models = Models::open(directory.path().to_owned(), BTreeMap::new(), STALL, None).unwrap();
    let credentials = [
        ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
        ("AWS_ENDPOINT_URL", server.endpoint()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    let credentials = credentials.map(|(name, value)| (name.to_owned(), value)).into();
    let begun = Instant::now();
    models.ensure("s3://models/large", &credentials, |_| {}).await.unwrap();
    begun.elapsed()
}

async fn rclone(server: &S3, flags: &'static [&'static str]) -> Duration {
    let endpoint = server.endpoint();
    tokio::task::spawn_blocking(move || {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("rclone");
        command.args(["copy", ":s3:models/large"]).arg(directory.path());
        command.args(["--s3-provider", "Other", "--s3-endpoint", &endpoint, "--s3-region", "us-east-1"]);
        command.args(["--s3-access-key-id", KEY, "--s3-secret-access-key", SECRET, "--config", "/dev/null"]);
        let begun = Instant::now();
        let output = command.args(flags).output().expect("rclone, of Debian's package");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        begun.elapsed()
    })
    .await
    .unwrap()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[tokio::main]
async fn main() {
    let mib: u64 = std::env::var("MODEL_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(2048);
    let server = S3::start().await;
    for shard in 0..FILES {
        fill(&server.file("models", &format!("large/shard-{shard}.safetensors")), (mib << 20) / FILES);
    }
    let tuned: &[&str] = &["--transfers", "16", "--multi-thread-streams", "16", "--multi-thread-cutoff", "16M"];
    let (mut own, mut default, mut parallel) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        own.push(ours(&server).await);
        default.push(rclone(&server, &[]).await);
        parallel.push(rclone(&server, tuned).await);
    }
    let (own, default, parallel) = (median(own), median(default), median(parallel));
    let rate = |took: Duration| mib as f64 / took.as_secs_f64();
    println!("{mib} MiB in {FILES} files from s3s-fs on loopback, median of {ROUNDS}:");
    for (name, took) in [("pilotlight", own), ("rclone", default), ("rclone, 16 streams", parallel)] {
        println!("  {name:<20} {:>7.0} MiB/s   {:.2} of pilotlight's", rate(took), rate(took) / rate(own));
    }
}
