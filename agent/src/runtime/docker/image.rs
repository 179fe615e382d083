//! Images: whether they are here, and getting them from a registry.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bollard::{
    Docker,
    auth::DockerCredentials,
    errors::Error,
    models::{CreateImageInfo, ImageInspect},
    query_parameters::CreateImageOptionsBuilder,
};
use bytesize::ByteSize;
use futures::StreamExt as _;
use serde::Deserialize;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::warn;

use super::{super::Say, RuntimeError, is_missing, pulled::Pulled};

/// A pull of which nothing is heard for this long has failed; unpacking a large layer is silent.
const SILENCE: Duration = Duration::from_secs(600);
/// Progress is told no more often than this.
const SAID_EVERY: Duration = Duration::from_secs(2);
/// The registry of images that name none.
const DOCKER_HUB: &str = "docker.io";

/// Gets the image as the policy says. True where something of it was not here. What is pulled is noted.
pub(super) async fn ensure(
    docker: &Docker,
    pulled: &Arc<Pulled>,
    image: &str,
    policy: &str,
    credentials: Option<DockerCredentials>,
    say: Say<'_>,
) -> Result<bool, RuntimeError> {
    let failed = |reason, message: String| RuntimeError::Container { reason, message };
    check_name(image).map_err(|why| failed("InvalidImageName", format!("image {image:?}: {why}")))?;
    let here = match docker.inspect_image(image).await {
        Ok(found) => Some(found.id.unwrap_or_default()),
        Err(error) if is_missing(&error) => None,
        Err(error) => return Err(failed("ImageInspectError", format!("image {image}: {error}"))),
    };
    match (policy, &here) {
        ("Always", _) | ("IfNotPresent" | "", None) => {}
        ("IfNotPresent" | "" | "Never", Some(id)) => {
            pulled.asked_for(image, id);
            return Ok(false);
        }
        ("Never", None) => {
            let message = format!("image {image} is not on this node, and imagePullPolicy is Never");
            return Err(failed("ErrImageNeverPull", message));
        }
        (other, _) => {
            return Err(RuntimeError::Specification {
                field: "imagePullPolicy",
                reason: format!("{other:?}: must be Always, IfNotPresent or Never"),
            });
        }
    }
    let began = Instant::now();
    // Without a note it stays here for good, but it is here.
    let note = pulled.begin(image).await;
    let note = note.inspect_err(|error| warn!(image, %error, "images cannot be listed; what is pulled is not noted"));
    let came = pull(docker, image, credentials, say).await;
    let came = came.map_err(|why| failed("ErrImagePull", format!("cannot pull image {image}: {why}")))?;
    if let Ok(note) = note {
        note.done(came.then(|| began.elapsed())).await;
    }
    Ok(came || here.is_none())
}

/// True where bytes came.
async fn pull(
    docker: &Docker,
    image: &str,
    credentials: Option<DockerCredentials>,
    say: Say<'_>,
) -> Result<bool, String> {
    // Without a tag the engine would get all of them.
    let options = CreateImageOptionsBuilder::default().from_image(&with_tag(image)).build();
    let mut stream = std::pin::pin!(docker.create_image(Some(options), None, credentials));
    let mut progress = Progress::default();
    // By the clock, so that the last news before a silence is told, too.
    let mut telling = tokio::time::interval(SAID_EVERY);
    telling.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let silence = tokio::time::sleep(SILENCE);
    tokio::pin!(silence);
    say(format!("pulling image {image}"));
    loop {
        tokio::select! {
            next = stream.next() => match next {
                None => return Ok(!progress.layers.is_empty()),
                Some(Err(Error::DockerStreamError { error })) => return Err(error),
                Some(Err(error)) => return Err(error.to_string()),
                Some(Ok(info)) => {
                    progress.take(&info);
                    silence.as_mut().reset(Instant::now() + SILENCE);
                }
            },
            _ = telling.tick() => if let Some(how_far) = progress.news() {
                say(format!("pulling image {image}: {how_far}"));
            },
            () = &mut silence => return Err(format!("nothing was heard of it for {SILENCE:?}")),
        }
    }
}

/// What has been heard of a pull.
#[derive(Debug, Default)]
struct Progress {
    /// Bytes that are here and bytes in all, by layer.
    layers: BTreeMap<String, (u64, u64)>,
    /// Percent told last.
    told: Option<u64>,
}

impl Progress {
    fn take(&mut self, info: &CreateImageInfo) {
        let Some(layer) = &info.id else { return };
        match info.status.as_deref() {
            Some("Downloading") => {
                let detail = info.progress_detail.clone().unwrap_or_default();
                let bytes = |count: Option<i64>| count.and_then(|count| u64::try_from(count).ok()).unwrap_or(0);
                self.layers.insert(layer.clone(), (bytes(detail.current), bytes(detail.total)));
            }
            Some("Download complete" | "Pull complete" | "Verifying Checksum" | "Extracting") => {
                if let Some((here, all)) = self.layers.get_mut(layer) {
                    *here = (*all).max(*here);
                }
            }
            _ => {}
        }
    }

    /// How far it is, where that is another percent than before: each news is a sign of progress to the
    /// roll-out, which remembers a limited number of them.
    fn news(&mut self) -> Option<String> {
        let (here, all) = self.layers.values().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
        let percent = (here * 100).checked_div(all)?;
        if self.told == Some(percent) {
            return None;
        }
        self.told = Some(percent);
        Some(format!("{} of {}", ByteSize(here).display().iec(), ByteSize(all).display().iec()))
    }
}

/// The user that the image runs as by itself; empty is root.
pub(super) fn user_of(image: &ImageInspect) -> String {
    image.config.as_ref().and_then(|config| config.user.clone()).unwrap_or_default()
}

/// Name without tag and digest, tag, digest.
fn parts(image: &str) -> (&str, Option<&str>, Option<&str>) {
    let (rest, digest) = image.split_once('@').map_or((image, None), |(rest, digest)| (rest, Some(digest)));
    let name_starts = rest.rfind('/').map_or(0, |at| at + 1);
    match rest[name_starts..].split_once(':') {
        Some((name, tag)) => (&rest[..name_starts + name.len()], Some(tag), digest),
        None => (rest, None, digest),
    }
}

fn with_tag(image: &str) -> String {
    match parts(image) {
        (name, None, None) => format!("{name}:latest"),
        _ => image.to_owned(),
    }
}

/// The registry, and the path of the image there.
fn registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
        _ => (DOCKER_HUB, name),
    }
}

/// The whole of a name, of which people leave out what goes without saying.
pub(super) fn canonical(image: &str) -> String {
    let (name, tag, digest) = parts(image);
    let (host, path) = registry(name);
    let official = if host == DOCKER_HUB && !path.contains('/') { "library/" } else { "" };
    let tag = tag.or(digest.is_none().then_some("latest")).map(|tag| format!(":{tag}")).unwrap_or_default();
    let digest = digest.map(|digest| format!("@{digest}")).unwrap_or_default();
    format!("{host}/{official}{path}{tag}{digest}")
}

/// The digest of an image's manifest, as the registry has it that it was pulled from by one of these names;
/// empty where the engine knows none.
pub(super) fn digest_of(image: &ImageInspect, names: &BTreeSet<String>) -> String {
    let repository = |name: &str| registry(parts(name).0).1.to_owned();
    let ours: BTreeSet<String> = names.iter().map(|name| repository(name)).collect();
    let all = || image.repo_digests.iter().flatten();
    let found = all().find(|name| ours.contains(&repository(name))).or_else(|| all().next());
    found.and_then(|name| parts(name).2).unwrap_or_default().to_owned()
}

/// Names as the OCI distribution specification has them.
fn check_name(image: &str) -> Result<(), String> {
    let (name, tag, digest) = parts(image);
    let (_, path) = registry(name);
    let small = |sign: char| sign.is_ascii_lowercase() || sign.is_ascii_digit();
    let component = |part: &str| {
        part.starts_with(small) && part.ends_with(small) && part.chars().all(|sign| small(sign) || "._-".contains(sign))
    };
    if !path.split('/').all(component) {
        return Err("the name must be of lower-case letters, digits, '.', '_' and '-' between slashes".to_owned());
    }
    let host = &name[..name.len() - path.len()];
    let starts = host.is_empty() || host.starts_with(|sign: char| sign.is_ascii_alphanumeric() || sign == '[');
    if !starts || !host.chars().all(|sign| sign.is_ascii_alphanumeric() || ".-:[]/".contains(sign)) {
        return Err("the registry must be a host name, with a port where needed".to_owned());
    }
    let word = |sign: char| sign.is_ascii_alphanumeric() || "._-".contains(sign);
    if let Some(tag) = tag
        && !(1..=128).contains(&tag.len()) | !tag.chars().all(word) | tag.starts_with(['.', '-'])
    {
        return Err("the tag must be of letters, digits, '.', '_' and '-', at most 128".to_owned());
    }
    if let Some(digest) = digest
        && !digest.split_once(':').is_some_and(|(kind, hex)| {
            kind == "sha256" && hex.len() == 64 && hex.chars().all(|s| s.is_ascii_hexdigit())
        })
    {
        return Err("the digest must be sha256: and 64 hexadecimal digits".to_owned());
    }
    Ok(())
}

/// A file as `docker login` writes it, and the value of a Secret of type `kubernetes.io/dockerconfigjson`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RegistryConfig {
    auths: BTreeMap<String, RegistryAuth>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RegistryAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl std::fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not shown")
    }
}

/// Credentials for the image: of the first configuration that has any, the entry that says the most of
/// the image's name. One that cannot be read has none.
pub(super) fn credentials(image: &str, given: &[String], own: Option<&Path>) -> Option<DockerCredentials> {
    let own = own.and_then(|path| std::fs::read_to_string(path).ok());
    given.iter().chain(own.as_ref()).find_map(|text| {
        let config: RegistryConfig = match serde_json::from_str(text) {
            Ok(config) => config,
            Err(error) => {
                // The error tells the place, not the content.
                warn!(line = error.line(), column = error.column(), "registry credentials cannot be read");
                return None;
            }
        };
        let best = config.auths.iter().filter(|(key, _)| covers(key, image)).max_by_key(|(key, _)| key.len());
        best.map(|(key, auth)| auth.credentials(key))
    })
}

/// True where credentials for `key` are meant for the image.
fn covers(key: &str, image: &str) -> bool {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let (host, path) = registry(parts(image).0);
    let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
    if host == DOCKER_HUB {
        return ["docker.io", "index.docker.io", "registry-1.docker.io"].contains(&key_host);
    }
    let below =
        path.strip_prefix(key_path).is_some_and(|rest| key_path.is_empty() || rest.starts_with('/') || rest.is_empty());
    key_host == host && below
}

impl RegistryAuth {
    fn credentials(&self, server: &str) -> DockerCredentials {
        let decoded = self.auth.as_ref().and_then(|auth| STANDARD.decode(auth.trim()).ok());
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
        let or = |own: &Option<String>, decoded: Option<&str>| own.clone().or_else(|| decoded.map(str::to_owned));
        DockerCredentials {
            username: or(&self.username, pair.map(|(user, _)| user)),
            password: or(&self.password, pair.map(|(_, password)| password)),
            identitytoken: self.identitytoken.clone(),
            serveraddress: Some(server.to_owned()),
            ..DockerCredentials::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::ProgressDetail;

    use super::*;

    #[test]
    fn names_are_checked_before_the_engine_is_asked() {
        let digest = format!("ghcr.io/a/b@sha256:{}", "0a".repeat(32));
        for good in ["a", "a/b:1", "localhost:5000/a/b_c:V1.2-x", "nvcr.io/nvidia/tritonserver:25.06-py3", &digest] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "A", "a b", "a:", "a:b c", "a@sha256:12", "ghcr.io/", "a//b", "a:-x", "../a", "a?b", "a/b:c:d"]
        {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert_eq!(with_tag("localhost:5000/a"), "localhost:5000/a:latest");
        assert_eq!(with_tag("a:1"), "a:1");
        assert_eq!(with_tag(&digest), digest);
    }

    #[test]
    fn what_goes_without_saying_makes_no_other_name() {
        for (name, whole) in [
            ("a", "docker.io/library/a:latest"),
            ("docker.io/library/a:latest", "docker.io/library/a:latest"),
            ("b/a:1", "docker.io/b/a:1"),
            ("localhost:5000/a", "localhost:5000/a:latest"),
            ("ghcr.io/b/a@sha256:00", "ghcr.io/b/a@sha256:00"),
        ] {
            assert_eq!(canonical(name), whole);
        }
        let digests = ["a.io/x@sha256:01", "b.io/y@sha256:02"].map(str::to_owned);
        let image = ImageInspect { repo_digests: Some(digests.to_vec()), ..Default::default() };
        let of = |names: &[&str]| digest_of(&image, &names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!((of(&["b.io/y:1"]).as_str(), of(&[]).as_str()), ("sha256:02", "sha256:01"));
    }

    #[test]
    fn credentials_are_for_the_registry_that_they_name() {
        let hub = STANDARD.encode("me:se:cret");
        let given = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{hub}"}}, "ghcr.io": {{"username": "wide", "password": "p"}},
                "ghcr.io/team": {{"username": "narrow", "password": "p"}}}}}}"#
        );
        let of = |image: &str| credentials(image, &["{".to_owned(), given.clone()], None);
        let user = |image: &str| of(image).and_then(|found| found.username);
        assert_eq!(user("library/x").as_deref(), Some("me"));
        assert_eq!(of("x").unwrap().password.as_deref(), Some("se:cret"));
        assert_eq!(user("ghcr.io/team/x:1").as_deref(), Some("narrow"));
        assert_eq!(user("ghcr.io/teams/x").as_deref(), Some("wide"));
        assert_eq!(user("quay.io/x"), None);
    }

    #[test]
    fn progress_is_the_sum_of_layers_and_told_once_per_percent() {
        let layer = |id: &str, status: &str, current, total| CreateImageInfo {
            id: Some(id.into()),
            status: Some(status.into()),
            progress_detail: Some(ProgressDetail { current: Some(current), total: Some(total) }),
            ..Default::default()
        };
        let mut progress = Progress::default();
        assert_eq!(progress.news(), None, "nothing is known yet");
        progress.take(&layer("a", "Downloading", 1 << 20, 4 << 20));
        progress.take(&layer("b", "Downloading", 0, 4 << 20));
        assert_eq!(progress.news().unwrap(), "1.0 MiB of 8.0 MiB");
        assert_eq!(progress.news(), None, "the same percent");
        progress.take(&layer("a", "Download complete", 0, 0));
        assert_eq!(progress.news().unwrap(), "4.0 MiB of 8.0 MiB");
    }
}
