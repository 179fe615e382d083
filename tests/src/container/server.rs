//! The server that the conformance suite runs: the standard library alone, built by `rustc` in the test.
use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::exit,
    thread::sleep,
    time::Duration,
};

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
}

extern "C" fn end(_: i32) {
    exit(3)
}

const MODELS: &str = "/mnt/models";

/// A file of the models; or, for `/write`, what becomes of writing to them.
fn file(path: &str) -> (&'static str, Vec<u8>) {
    if path == "/write" {
        let some = fs::read_dir(MODELS).unwrap().next().unwrap().unwrap().path();
        let tries = [fs::write(format!("{MODELS}/new"), "x"), fs::write(&some, "x"), fs::remove_file(&some)];
        return ("200 OK", format!("{:?}", tries.map(|tried| tried.map_err(|error| error.kind()))).into());
    }
    match fs::read(format!("{MODELS}{path}")) {
        Ok(content) => ("200 OK", content),
        Err(error) => ("404 Not Found", error.to_string().into()),
    }
}

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let first = args.first().map(String::as_str).unwrap_or_default();
    println!("args {}", args.join(" "));
    match first {
        "exit" => exit(args[1].parse().unwrap()),
        "eat" => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1_u8; 1 << 20]);
            }
        }
        "look" => exit(if fs::exists(&args[1]).unwrap() { 0 } else { 4 }),
        "check" => exit(if args[1] == "good" { 0 } else { 9 }),
        // Its models are there when it starts, or it ends.
        "files" if fs::read_dir(MODELS).map_or(0, |files| files.count()) == 0 => exit(5),
        _ => {}
    }
    // As one that loads something before it listens.
    if let ("files" | "late", Some(seconds)) = (first, args.get(1)) {
        sleep(Duration::from_secs(seconds.parse().unwrap()));
    }
    // SAFETY: the handler only ends the process.
    unsafe {
        signal(15, if first == "stubborn" { 1 } else { end as extern "C" fn(i32) as usize });
    }
    let address = if fs::exists("/.dockerenv").unwrap() { "0.0.0.0" } else { "127.0.0.1" };
    let listener = TcpListener::bind((address, env::var("PORT").unwrap().parse().unwrap())).unwrap();
    println!("listening");
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        if first == "relay" {
            // What a transformer does: asks its predictor, and answers with what that said.
            let mut predictor = TcpStream::connect(env::var("PILOTLIGHT_PREDICTOR_HOST").unwrap()).unwrap();
            predictor.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            predictor.read_to_string(&mut answer).unwrap();
            let _ = stream.write_all(answer.as_bytes());
            continue;
        }
        if first == "files" {
            let asked = String::from_utf8_lossy(&request);
            let (status, body) = file(asked.split(' ').nth(1).unwrap_or_default());
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
            continue;
        }
        let variables: String = env::vars().map(|(name, value)| format!("{name}={value}\n")).collect();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let written = fs::write("/written", "x").is_ok();
        let secret = fs::read_to_string("/secret/token").unwrap_or_default();
        let body = format!(
            "args={}\ncwd={}\n{variables}{status}{mounts}written={written}\nsecret={secret}\n",
            args.join(" "),
            env::current_dir().unwrap().display(),
        );
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    }
}
