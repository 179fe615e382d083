//! Mounts for processes, which have no file system of their own: their words name the real folder.

use super::Mount;

/// Replaces each mount's path by the folder that it stands for, where it is a whole path or the beginning
/// of one: `--model=/mnt/models/m.bin`, not `/mnt/models-old` and not `/x/mnt/models`.
pub(super) fn rewrite(text: &str, mounts: &[Mount]) -> String {
    let mut written = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let begins = !text[..at].ends_with(part_of_a_name);
        let rest = &text[at..];
        let stands_here = |mount: &&Mount| {
            let after = rest.strip_prefix(mount.target.as_str());
            after.is_some_and(|after| after.starts_with('/') || !after.starts_with(part_of_a_name))
        };
        // The longest, where one mount lies in another.
        let found = mounts.iter().filter(stands_here).max_by_key(|mount| mount.target.len());
        match found.filter(|mount| begins && !mount.target.is_empty()) {
            Some(mount) => {
                written.push_str(&mount.source.to_string_lossy());
                at += mount.target.len();
            }
            None => {
                let Some(sign) = rest.chars().next() else { break };
                written.push(sign);
                at += sign.len_utf8();
            }
        }
    }
    written
}

fn part_of_a_name(sign: char) -> bool {
    sign.is_alphanumeric() || "-_./".contains(sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_to_the_folder_and_others_stay() {
        let mount =
            |source: &str, target: &str| Mount { source: source.into(), target: target.into(), read_only: true };
        let mounts = [mount("/cache/m", "/mnt/models"), mount("/cache/l", "/mnt/models/lora")];
        let cases = [
            ("/mnt/models", "/cache/m"),
            ("--model=/mnt/models/a.bin", "--model=/cache/m/a.bin"),
            ("/mnt/models:/mnt/models/lora/x", "/cache/m:/cache/l/x"),
            ("/mnt/models-old", "/mnt/models-old"),
            ("/x/mnt/models", "/x/mnt/models"),
            ("é=/mnt/models", "é=/cache/m"),
            ("", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(rewrite(text, &mounts), expected, "{text}");
        }
    }
}
