//! Images that operators want on the node before a replica needs them: each is pulled once when it is asked
//! for, and when the agent starts. One that goes later for others' sake is not pulled again by itself: how
//! much room it takes is known only once it is there, so it would come and go for ever.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use pilotlight_proto::fleet::v1::ImageAssignment;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::{Models, room::Images};
use crate::reconcile::backoff::CrashBackoff;

/// Pulls that were asked for, by name.
#[derive(Debug, Default)]
pub(super) struct WarmImages(Mutex<HashMap<String, Pull>>);

/// A pull, and the credentials that it was begun with.
#[derive(Debug)]
struct Pull {
    configs: Vec<String>,
    task: JoinHandle<()>,
}

impl WarmImages {
    /// Begins what is asked for now, and ends what is not any more.
    pub(super) fn assign(&self, models: &Models, images: &[ImageAssignment]) {
        let Some(engine) = models.room.images() else {
            for image in images.iter().filter(|image| image.warm) {
                let reason = "this node has no container engine that could pull it".to_owned();
                models.room.record_failure(&image.image, Some(reason));
            }
            return;
        };
        let mut pulls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let warm = |name: &str| images.iter().find(|image| image.warm && image.image == name);
        pulls.retain(|name, Pull { configs, task }| {
            let goes_on = warm(name).is_some_and(|image| task.is_finished() || image.registry_configs == *configs);
            if !goes_on {
                task.abort();
            }
            goes_on
        });
        for image in images.iter().filter(|image| image.warm) {
            pulls.entry(image.image.clone()).or_insert_with(|| {
                let configs = image.registry_configs.clone();
                let pull = pull(models.clone(), Arc::clone(&engine), image.image.clone(), configs.clone());
                Pull { configs, task: tokio::spawn(pull) }
            });
        }
    }
}

/// Tries until it is there.
async fn pull(models: Models, engine: Arc<dyn Images>, image: String, configs: Vec<String>) {
    let (mut backoff, mut said) = (CrashBackoff::default(), String::new());
    loop {
        let began = Instant::now();
        models.settled(&image).await;
        match Arc::clone(&engine).pull(&image, &configs).await {
            Ok(()) => {
                models.room.record_failure(&image, None);
                return info!(%image, took = ?began.elapsed(), "image is here, as asked for");
            }
            Err(reason) if reason != said => {
                warn!(%image, %reason, "image cannot be had as asked for; it is tried again");
                models.room.record_failure(&image, Some(reason.clone()));
                said = reason;
            }
            Err(_) => {}
        }
        tokio::time::sleep(backoff.after(began.elapsed())).await;
    }
}
