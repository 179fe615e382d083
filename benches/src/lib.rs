//! Benchmarks: one file per claim. What several of them need is here.

use std::time::Duration;

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};
use object_store::{ObjectStoreExt as _, WriteMultipart, aws::AmazonS3Builder};
use pilotlight_tests::s3::{KEY, S3, SECRET};

/// Files of the model, as the shards of a large one.
pub const SHARDS: u64 = 4;
/// Bytes of one part of an upload, as of the AWS command line.
const PART: usize = 8 << 20;

/// Lays a model of [`SHARDS`] files of so many bytes that do not repeat into `s3://models/large`, in parts by
/// the server's API: it then keeps their ETags, and does not hash a whole object for each range.
///
/// # Panics
/// The server refuses.
pub async fn upload_model(server: &S3, bytes_of_shard: u64) {
    server.bucket("models");
    let store = AmazonS3Builder::new()
        .with_bucket_name("models")
        .with_endpoint(server.endpoint())
        .with_allow_http(true)
        .with_access_key_id(KEY)
        .with_secret_access_key(SECRET)
        .build()
        .expect("all is given that it needs");
    for shard in 0..SHARDS {
        let to = store.put_multipart(&format!("large/shard-{shard}.safetensors").into()).await;
        let mut to = WriteMultipart::new_with_chunk_size(to.expect("an upload begins"), PART);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ (shard + 1);
        for _ in 0..bytes_of_shard.div_ceil(PART as u64) {
            to.wait_for_capacity(4).await.expect("a part is taken");
            to.put(block(&mut state, PART).into());
        }
        to.finish().await.expect("an upload ends");
    }
}

/// The middle one, the upper of two.
///
/// # Panics
/// There is none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// User and system time of this process, or of the processes that it has waited for.
///
/// # Panics
/// The kernel does not count it.
pub fn cpu_time(who: UsageWho) -> Duration {
    let usage = getrusage(who).expect("the kernel counts");
    let micros = |time: TimeVal| time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64;
    Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time()))
}

/// A number that a variable of the environment gives, or else the other one.
pub fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// Uses so much memory once, and frees it: the host of a virtual machine takes back what has been free for a while, and
/// whoever uses it next waits for it, with more than what is measured.
///
/// # Panics
/// There is not so much.
pub fn ready_memory(bytes: u64) {
    let mut memory = vec![0_u8; usize::try_from(bytes).expect("64 bits")];
    memory.chunks_mut(4096).for_each(|page| page[0] = 1);
    std::hint::black_box(memory);
}

/// Bytes that do not repeat.
fn block(state: &mut u64, bytes: usize) -> Vec<u8> {
    let mut block = vec![0_u8; bytes];
    for word in block.chunks_exact_mut(8) {
        // xorshift64
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    block
}
