//! Events as a daemon sends them.

use crate::ClientError;
use haven_model::Event;
use http_body_util::BodyExt;
use hyper::{Response, body::Incoming};
use std::{pin::Pin, time::Duration};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, Lines};

/// The daemon sends a sign of life every 15 s when nothing happens; one that sends none for so long is gone.
const SILENCE: Duration = Duration::from_secs(45);

/// A connection over which events come.
pub struct EventStream {
    lines: Lines<Pin<Box<dyn AsyncBufRead + Send>>>,
    at: String,
}

impl EventStream {
    pub(crate) fn of(response: Response<Incoming>, at: String) -> Self {
        let frames = response.into_body().into_data_stream();
        let stream = futures::TryStreamExt::map_err(frames, std::io::Error::other);
        let reader: Pin<Box<dyn AsyncBufRead + Send>> =
            Box::pin(tokio_util::io::StreamReader::new(Box::pin(stream)));
        Self { lines: reader.lines(), at }
    }

    /// The next event, however long it takes.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when the connection has ended or its daemon is silent.
    pub async fn next(&mut self) -> Result<Event, ClientError> {
        let gone = |why: String| ClientError::Unreachable { at: self.at.clone(), why };
        loop {
            let line = tokio::time::timeout(SILENCE, self.lines.next_line()).await;
            let line =
                line.map_err(|_| gone(format!("no sign of life for {} s", SILENCE.as_secs())))?;
            let line = line.map_err(|error| gone(error.to_string()))?;
            let line = line.ok_or_else(|| gone("the connection ended".into()))?;
            let event = line.strip_prefix("data:").map(str::trim_start);
            if let Some(event) = event.and_then(|text| serde_json::from_str(text).ok()) {
                return Ok(event);
            }
        }
    }
}
