//! README's walks, word for word: its commands are taken from the file and run by bash, in namespaces of their own, so that
//! the default ports are free and `/tmp/pilotlight` is empty.

use std::{path::Path, process::Command};

use pilotlight_tests::process::pilotlight;

/// Ends a walk that hangs; no expectation.
const HANGS_AFTER: &str = "900";
const ANSWER: &str = r#"{"predictions":[1,0]}"#;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository")
}

/// The blocks of shell commands of one of README's sections.
fn commands(section: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("README.md");
    let heading = format!("\n## {section}\n");
    let text = readme.split(&heading).nth(1).unwrap_or_else(|| panic!("README has no section {section:?}"));
    let text = text.split("\n## ").next().unwrap_or_default();
    text.split("```sh\n").skip(1).filter_map(|block| block.split("```").next()).map(str::to_owned).collect()
}

/// Runs a script of bash and returns what it printed.
fn run(script: &str) -> String {
    let private = "mkdir -p /tmp/pilotlight .pilotlight\nmount -t tmpfs walk /tmp/pilotlight\n\
                   mount -t tmpfs walk .pilotlight\nip link set lo up\nlog=$(mktemp -d)\n\
                   trap 'code=$?; [ $code = 0 ] || tail -n 50 \"$log\"/*; exit $code' EXIT\n";
    let script = format!("set -euo pipefail\nexport PATH=\"$PWD/target/debug:$PATH\"\n{private}{script}");
    // It is built already, maybe in another target directory.
    let bin = pilotlight().parent().expect("a directory").display().to_string();
    let script = script.replace("cargo build --bin pilotlight\n", "").replace("$PWD/target/debug", &bin);
    let mut unshare = Command::new("timeout");
    unshare.args([
        "--kill-after=5",
        HANGS_AFTER,
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    if !nix::unistd::Uid::effective().is_root() {
        unshare.arg("--map-root-user");
    }
    let output = unshare.args(["bash", "-c", &script]).current_dir(repository()).output().expect("unshare runs");
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{printed}\n--- of ---\n{script}", output.status);
    printed
}

#[test]
fn the_walk_through_dev_works_as_written() {
    let blocks = commands("A walk");
    let [first_terminal, second_terminal, rest] = blocks.as_slice() else { panic!("{blocks:?}") };
    let (asking, watching) = second_terminal.split_once("pilotlight get -w\n").expect("it ends by watching");
    assert_eq!(watching, "");
    let printed = run(&format!(
        "({first_terminal}) >\"$log/dev\" 2>&1 &\n\
         until pilotlight get nodes 2>/dev/null | grep -q Ready; do sleep 0.2; done\n\
         {asking}\n\
         pilotlight get -w >\"$log/watch\" & watch=$!\n\
         until grep -q ' 0/0 ' \"$log/watch\"; do sleep 0.2; done\n\
         kill $watch\n\
         until pilotlight get replicas | grep -q Asleep; do sleep 0.2; done\n\
         {asking}\n{rest}"
    ));
    assert_eq!(printed.matches(ANSWER).count(), 2, "{printed}");
}

#[test]
fn the_walk_through_a_fleet_works_as_written_through_both_gateways_and_after_sleep() {
    let blocks = commands("A fleet");
    let [store, agents, asking] = blocks.as_slice() else { panic!("{blocks:?}") };
    let printed = run(&format!(
        "exec 3>&1\nexec >\"$log/fleet\" 2>&1\n{store}\n{agents}\n\
         for walk in 1 2 3; do\n\
         {{ {asking}\n}} >&3\n\
         until pilotlight get replicas | grep -q Asleep; do sleep 0.2; done\n\
         done\n"
    ));
    assert_eq!(printed.matches(ANSWER).count(), 6, "{printed}");
}
