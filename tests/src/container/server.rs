//! The server that the conformance suite runs: the standard library alone, built by `rustc` in the test.
use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::exit,
};

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
}

extern "C" fn end(_: i32) {
    exit(3)
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
        _ => {}
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
