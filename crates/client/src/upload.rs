//! Sending a large file: as long as it takes, as long as it moves.

use crate::{Client, ClientError, encode, read};
use futures::TryStreamExt;
use haven_model::api::Item;
use http_body_util::{BodyExt, StreamBody};
use hyper::{Request, body::Frame};
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::io::AsyncRead;

/// How long nothing may move. At its end the daemon writes all of it to disk before it answers.
const STALLED: Duration = Duration::from_secs(300);

impl Client {
    /// Imports a part of an image: `disk`, `kernel` or `initrd`. `query` is `checksum=…&cmdline=…`, encoded.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::NoAnswer`] when nothing moved for 5 minutes, [`ClientError::Source`] when
    /// `from` breaks off.
    pub async fn import(
        &self,
        image: &str,
        part: &str,
        query: &str,
        from: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<Item, ClientError> {
        let sent = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&sent);
        let frames = tokio_util::io::ReaderStream::with_capacity(from, 1 << 16);
        let counted = frames.inspect_ok(move |bytes| {
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        });
        let broken = Arc::new(OnceLock::new());
        let why = Arc::clone(&broken);
        let told = counted.inspect_err(move |error| {
            let _ = why.set(error.to_string());
        });
        let body = StreamBody::new(told.map_ok(Frame::data)).boxed_unsync();
        let path = format!("/v1/import/{}/{}?{query}", encode(image), encode(part));
        let answer = self.exchange(Request::builder().method("PUT").uri(path), body);
        tokio::pin!(answer);
        let mut before = 0;
        let response = loop {
            if let Ok(answer) = tokio::time::timeout(STALLED, &mut answer).await {
                break answer.map_err(|error| match broken.get() {
                    Some(why) => ClientError::Source(why.clone()),
                    None => error,
                })?;
            }
            let now = sent.load(Ordering::Relaxed);
            if now == before {
                let (at, within) = (self.place(), STALLED);
                return Err(ClientError::NoAnswer { at, within, change: true });
            }
            before = now;
        };
        let text = read(response).await?;
        serde_json::from_slice(&text).map_err(|error| ClientError::Unexpected(error.to_string()))
    }
}
