//! A thin NBD client: reads an export or fills it, asks which parts of it hold something and which
//! were written to since a bitmap began, and gives back what was read. It speaks the fixed newstyle handshake,
//! structured replies and metadata contexts, one request at a time.
//!
//! What it promises: every request ends by its time limit, also when the server hangs or stops
//! reading; nothing that the server says makes it take more memory than the bounds below; what does
//! not follow the protocol is an error with a sentence. A request that the server refused
//! ([`Refused`]) leaves the connection as it was. After any other error, or a request that was
//! given up half-way, nobody knows what the next byte belongs to: every later request fails.
//!
//! ```text
//!   read   ─┐                ┌─ data, holes: into the caller's bytes, each byte once ─┐
//!   status ─┼─► one request ─┼─ extents of both contexts ─────────────────────────────┼─► done
//!   trim   ─┤                └─ an error, of all or of a part ────────────────────────┘
//!   write, flush ─┘
//! ```
//!
//! With a point-in-time view of QEMU's (`snapshot-access`) a request that touches one byte that was
//! trimmed is refused as a whole, its status included; and a trim is rounded inwards to clusters of
//! the copy, 64 KiB.

use super::views::Extent;
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    time::timeout,
};

/// How long a request may take unless told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The most that is asked for at once, bytes; every server grants it that says nothing else.
const MOST: u32 = 32 << 20;
/// The longest name or text of the protocol, bytes.
const TEXT: u32 = 4096;
/// The longest answer to an option, bytes.
const OPTION: u32 = 2 * TEXT;
/// Answers to one option at most.
const ANSWERS: usize = 64;
/// Extents of one context in one answer at most; QEMU sends no more.
const EXTENTS: u32 = 131_072;
/// Parts of one read at most: four times the pages of [`MOST`].
const PARTS: usize = 32_768;

const GREETING: u64 = 0x4e42_444d_4147_4943;
const OPTIONS: u64 = 0x4948_4156_454f_5054;
const OPTION_ANSWER: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;

/// Flags of the greeting, and of the answer to it.
const FIXED: u16 = 1;
const NO_ZEROES: u16 = 2;
/// Flags of an export.
const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 1 << 1;
const FLUSHES: u16 = 1 << 2;
const TRIMS: u16 = 1 << 5;

const GO: u32 = 7;
const USE_STRUCTURED: u32 = 8;
const SET_CONTEXTS: u32 = 10;

const ACK: u32 = 1;
const INFO: u32 = 3;
const CONTEXT: u32 = 4;
const REFUSED: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const DISCONNECT: u16 = 2;
const TRIM: u16 = 4;
const STATUS: u16 = 7;

const DONE: u16 = 1;
const NOTHING: u16 = 0;
const DATA: u16 = 1;
const HOLE: u16 = 2;
const BLOCKS: u16 = 5;
const ERROR: u16 = 1 << 15;

const NO_REASON: &str = "it gave no reason";
const ALLOCATION: &str = "base:allocation";
/// Flags of extents.
const ZERO: u32 = 2;
const DIRTY: u32 = 1;

/// What the server would not do. The connection is as good as before.
#[derive(Debug, thiserror::Error)]
#[error("the NBD server refused to {what}: {said} (error {code})")]
pub struct Refused {
    /// The number of the error: that of Linux, for a request; one of the protocol's own, for the
    /// handshake.
    pub code: u32,
    what: String,
    said: String,
}

impl Refused {
    /// The refusal that an error of [`Nbd`] is, if it is one.
    #[must_use]
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

/// A connection to one export.
pub struct Nbd<S> {
    stream: BufReader<S>,
    patience: Duration,
    export: Export,
    allocation: u32,
    dirt: Option<u32>,
    cookie: u64,
    /// A request has begun and not ended.
    astray: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Export {
    size: u64,
    flags: u16,
    /// What offsets and lengths are multiples of.
    least: u32,
    /// The most that one request may read.
    most: u32,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

/// Where the answer to a request goes.
enum Taken<'a> {
    Nowhere,
    /// The bytes, and which parts of them have come.
    Bytes(&'a mut [u8], Vec<(u64, u64)>),
    /// Length and flags of the extents of each context.
    Extents(Vec<(u32, Runs)>),
}

type Runs = Vec<(u64, u32)>;

fn wrong(text: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server {text}"))
}

fn asked_wrongly(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Says of what the other side did not say what that means.
fn ended(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(error.kind(), "the NBD server ended the connection")
        }
        kind => io::Error::new(kind, format!("the connection to the NBD server broke: {error}")),
    }
}

async fn in_time<T>(
    patience: Duration,
    what: &str,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout(patience, work).await.unwrap_or_else(|_| {
        let text = format!("the NBD server did not {what} within {patience:?}");
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

impl<S: AsyncRead + AsyncWrite + Unpin> Nbd<S> {
    /// Opens an export, with one of its bitmaps if that is named. Each request has [`PATIENCE`],
    /// and so has this.
    ///
    /// # Errors
    /// [`Refused`], say when there is no such export; otherwise what is wrong with the connection
    /// or the server.
    pub async fn connect(stream: S, export: &str, bitmap: Option<&str>) -> io::Result<Self> {
        Self::connect_within(stream, export, bitmap, PATIENCE).await
    }

    /// As [`Nbd::connect`], with another time limit of each request.
    ///
    /// # Errors
    /// As [`Nbd::connect`].
    pub async fn connect_within(
        stream: S,
        export: &str,
        bitmap: Option<&str>,
        patience: Duration,
    ) -> io::Result<Self> {
        let mut nbd = Self {
            stream: BufReader::new(stream),
            patience,
            export: Export::default(),
            allocation: 0,
            dirt: None,
            cookie: 0,
            astray: false,
        };
        let opens = nbd.open(export, bitmap);
        in_time(patience, &format!("open the export `{export}`"), opens).await?;
        Ok(nbd)
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// Reads as many bytes as there is room for.
    ///
    /// # Errors
    /// [`Refused`], say for what was trimmed; otherwise what is wrong with the connection or the
    /// server. What the bytes are then is not said.
    pub async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.in_bounds(offset, into.len() as u64)?;
        let mut offset = offset;
        for part in into.chunks_mut(self.export.most as usize) {
            let length = part.len() as u32;
            self.ask(READ, offset, length, &mut Taken::Bytes(part, Vec::new())).await?;
            offset += u64::from(length);
        }
        Ok(())
    }

    /// Extents from `offset` on, one after the other, covering at least one byte and at most
    /// `length`.
    ///
    /// # Errors
    /// [`Refused`], say when one byte of it was trimmed; otherwise what is wrong with the
    /// connection or the server.
    pub async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        self.in_bounds(offset, length.into())?;
        if length == 0 {
            return Err(asked_wrongly("the status of no bytes was asked for".into()));
        }
        let mut into = Taken::Extents(Vec::new());
        self.ask(STATUS, offset, length, &mut into).await?;
        let Taken::Extents(mut contexts) = into else { return Ok(Vec::new()) };
        let mut of = |id: u32| {
            let place = contexts.iter().position(|(context, _)| *context == id);
            place.map(|place| contexts.swap_remove(place).1)
        };
        let zeroes = of(self.allocation);
        let dirt = self.dirt.map_or(Some(vec![(u64::from(length), DIRTY)]), &mut of);
        let (Some(zeroes), Some(dirt)) = (zeroes, dirt) else {
            // It is in step still, but will not be believed again.
            self.astray = true;
            return Err(wrong("left out what was asked about an extent"));
        };
        Ok(merged(&zeroes, &dirt, length.into()))
    }

    /// Gives back what is not needed any more; false when the export does not offer that.
    ///
    /// # Errors
    /// [`Refused`]; otherwise what is wrong with the connection or the server.
    pub async fn trim(&mut self, offset: u64, length: u32) -> io::Result<bool> {
        self.in_bounds(offset, length.into())?;
        if self.export.flags & TRIMS == 0 {
            return Ok(false);
        }
        if length > 0 {
            self.ask(TRIM, offset, length, &mut Taken::Nowhere).await?;
        }
        Ok(true)
    }

    /// Writes all of these bytes.
    ///
    /// # Errors
    /// [`Refused`], say for want of room; otherwise what is wrong with the connection or the server.
    pub async fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.in_bounds(offset, from.len() as u64)?;
        if self.export.flags & READ_ONLY != 0 {
            return Err(asked_wrongly("the export is only read".into()));
        }
        let mut offset = offset;
        for part in from.chunks(self.export.most as usize) {
            self.asked(WRITE, offset, part.len() as u32, part, &mut Taken::Nowhere).await?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Brings to the disk what was written.
    ///
    /// # Errors
    /// [`Refused`]; otherwise what is wrong with the connection or the server.
    pub async fn flush(&mut self) -> io::Result<()> {
        match self.export.flags & FLUSHES {
            0 => Ok(()),
            _ => self.ask(FLUSH, 0, 0, &mut Taken::Nowhere).await,
        }
    }

    /// Says goodbye; without it the server takes the end of the connection for a fault.
    ///
    /// # Errors
    /// When it cannot be said.
    pub async fn disconnect(mut self) -> io::Result<()> {
        if self.astray {
            return Ok(());
        }
        let goodbye = Request { kind: DISCONNECT, cookie: 0, offset: 0, length: 0 };
        in_time(self.patience, "take a goodbye", send(&mut self.stream, &goodbye, &[])).await
    }

    fn in_bounds(&self, offset: u64, length: u64) -> io::Result<()> {
        let Export { size, least, .. } = self.export;
        if offset.checked_add(length).is_none_or(|end| end > size) {
            let text = format!("{length} bytes at {offset} are not within an export of {size}");
            return Err(asked_wrongly(text));
        }
        if !offset.is_multiple_of(least.into()) || !length.is_multiple_of(least.into()) {
            let text = format!("{length} bytes at {offset} are no whole blocks of {least} bytes");
            return Err(asked_wrongly(text));
        }
        Ok(())
    }

    /// One request and all of its answer.
    async fn ask(
        &mut self,
        kind: u16,
        offset: u64,
        length: u32,
        into: &mut Taken<'_>,
    ) -> io::Result<()> {
        self.asked(kind, offset, length, &[], into).await
    }

    /// The same, with what is written.
    async fn asked(
        &mut self,
        kind: u16,
        offset: u64,
        length: u32,
        data: &[u8],
        into: &mut Taken<'_>,
    ) -> io::Result<()> {
        if self.astray {
            let text = "an earlier request to the NBD server did not end as it should";
            return Err(io::Error::new(io::ErrorKind::NotConnected, text));
        }
        self.astray = true;
        self.cookie += 1;
        let request = Request { kind, cookie: self.cookie, offset, length };
        let what = match kind {
            READ => format!("read {length} bytes at {offset}"),
            WRITE => format!("write {length} bytes at {offset}"),
            FLUSH => "bring what was written to the disk".to_owned(),
            STATUS => format!("tell the status of {length} bytes at {offset}"),
            _ => format!("trim {length} bytes at {offset}"),
        };
        let exchange = async {
            send(&mut self.stream, &request, data).await?;
            answer(&mut self.stream, &request, into).await
        };
        let refused = in_time(self.patience, &what, exchange).await?;
        self.astray = false;
        match refused {
            Some((code, said)) => Err(io::Error::other(Refused { code, what, said })),
            None => Ok(()),
        }
    }
}

/// The handshake.
impl<S: AsyncRead + AsyncWrite + Unpin> Nbd<S> {
    async fn open(&mut self, export: &str, bitmap: Option<&str>) -> io::Result<()> {
        let dirt = bitmap.map(|name| format!("qemu:dirty-bitmap:{name}"));
        for name in [Some(export), dirt.as_deref()].into_iter().flatten() {
            if name.len() > TEXT as usize {
                return Err(asked_wrongly(format!("a name has {} bytes", name.len())));
            }
        }
        let stream = &mut self.stream;
        if stream.read_u64().await.map_err(ended)? != GREETING {
            return Err(wrong("does not greet as one"));
        }
        if stream.read_u64().await.map_err(ended)? != OPTIONS {
            return Err(wrong("knows the oldstyle handshake only"));
        }
        let offers = stream.read_u16().await.map_err(ended)?;
        if offers & FIXED == 0 {
            return Err(wrong("does not know the fixed newstyle handshake"));
        }
        let flags = u32::from(FIXED | (offers & NO_ZEROES));
        stream.write_all(&flags.to_be_bytes()).await.map_err(ended)?;

        self.option(USE_STRUCTURED, &[], "use structured replies", |_, _| Ok(())).await?;
        self.contexts(export, dirt.as_deref()).await?;
        self.go(export).await
    }

    async fn contexts(&mut self, export: &str, dirt: Option<&str>) -> io::Result<()> {
        let wanted: Vec<&str> = [Some(ALLOCATION), dirt].into_iter().flatten().collect();
        let mut data = text(export);
        data.extend((wanted.len() as u32).to_be_bytes());
        wanted.iter().for_each(|name| data.extend(text(name)));
        let mut found: Vec<(u32, usize)> = Vec::new();
        let take = |kind: u32, mut told: &[u8]| {
            if kind != CONTEXT {
                return Err(wrong("answered a question for contexts with something else"));
            }
            let id = take_u32(&mut told)?;
            let place = wanted.iter().position(|name| name.as_bytes() == told);
            let place = place.ok_or_else(|| wrong("told of a context that nobody asked for"))?;
            if found.iter().any(|(before, at)| *before == id || *at == place) {
                return Err(wrong("told of a context twice"));
            }
            found.push((id, place));
            Ok(())
        };
        self.option(SET_CONTEXTS, &data, "tell what it knows of extents", take).await?;
        let id = |place: usize| found.iter().find(|(_, at)| *at == place).map(|(id, _)| *id);
        let lacks = |name: &str| {
            let text = format!("the export `{export}` has no `{name}`");
            io::Error::new(io::ErrorKind::NotFound, text)
        };
        self.allocation = id(0).ok_or_else(|| lacks(ALLOCATION))?;
        self.dirt = match dirt {
            Some(name) => Some(id(1).ok_or_else(|| lacks(name))?),
            None => None,
        };
        Ok(())
    }

    async fn go(&mut self, export: &str) -> io::Result<()> {
        let mut data = text(export);
        data.extend(1_u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        let (mut found, mut blocks) = (None, (1, MOST));
        let take = |kind: u32, mut told: &[u8]| {
            if kind != INFO {
                return Err(wrong("answered a question for an export with something else"));
            }
            match take_u16(&mut told)? {
                INFO_EXPORT => found = Some((take_u64(&mut told)?, take_u16(&mut told)?)),
                INFO_BLOCK_SIZE => {
                    let least = take_u32(&mut told)?;
                    let _preferred = take_u32(&mut told)?;
                    blocks = (least, take_u32(&mut told)?);
                }
                // What else it tells of the export is not needed.
                _ => {}
            }
            Ok(())
        };
        self.option(GO, &data, &format!("open the export `{export}`"), take).await?;
        let (size, flags) = found.ok_or_else(|| wrong("did not tell how large the export is"))?;
        let (least, most) = blocks;
        if flags & HAS_FLAGS == 0 || size > i64::MAX as u64 {
            return Err(wrong(format!("told of an export of {size} bytes with flags {flags:#x}")));
        }
        if !least.is_power_of_two() || least > 65_536 || most < least {
            return Err(wrong(format!("told of blocks of {least} to {most} bytes")));
        }
        // The most may be no multiple of the least.
        let most = most.min(MOST) / least * least;
        self.export = Export { size, flags, least, most };
        Ok(())
    }

    /// Negotiates an option; `take` gets each answer before the last.
    async fn option(
        &mut self,
        option: u32,
        data: &[u8],
        what: &str,
        mut take: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut line = OPTIONS.to_be_bytes().to_vec();
        line.extend(option.to_be_bytes());
        line.extend((data.len() as u32).to_be_bytes());
        line.extend(data);
        self.stream.write_all(&line).await.map_err(ended)?;
        self.stream.flush().await.map_err(ended)?;
        for _ in 0..ANSWERS {
            let stream = &mut self.stream;
            if stream.read_u64().await.map_err(ended)? != OPTION_ANSWER {
                return Err(wrong("answered an option with something else"));
            }
            let about = stream.read_u32().await.map_err(ended)?;
            let kind = stream.read_u32().await.map_err(ended)?;
            let length = stream.read_u32().await.map_err(ended)?;
            if about != option {
                return Err(wrong(format!("answered option {option} with one to {about}")));
            }
            let told = payload(stream, length, OPTION).await?;
            if kind & REFUSED != 0 {
                let (code, what) = (kind & !REFUSED, what.to_owned());
                let said = if told.is_empty() { NO_REASON.to_owned() } else { words(&told) };
                return Err(io::Error::other(Refused { code, what, said }));
            }
            if kind == ACK {
                return Ok(());
            }
            take(kind, &told)?;
        }
        Err(wrong(format!("gave more than {ANSWERS} answers to one option")))
    }
}

async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    request: &Request,
    data: &[u8],
) -> io::Result<()> {
    let mut line = REQUEST.to_be_bytes().to_vec();
    line.extend(0_u16.to_be_bytes());
    line.extend(request.kind.to_be_bytes());
    line.extend(request.cookie.to_be_bytes());
    line.extend(request.offset.to_be_bytes());
    line.extend(request.length.to_be_bytes());
    stream.write_all(&line).await.map_err(ended)?;
    stream.write_all(data).await.map_err(ended)?;
    stream.flush().await.map_err(ended)
}

/// Takes the whole answer to a request; the error that the server tells, if it does.
async fn answer<R: AsyncRead + Unpin>(
    stream: &mut R,
    request: &Request,
    into: &mut Taken<'_>,
) -> io::Result<Option<(u32, String)>> {
    let mut refused = None;
    loop {
        match stream.read_u32().await.map_err(ended)? {
            SIMPLE => {
                let code = stream.read_u32().await.map_err(ended)?;
                is_to(request, stream.read_u64().await.map_err(ended)?)?;
                if code == 0 && !matches!(into, Taken::Nowhere) {
                    return Err(wrong("answered a read with nothing"));
                }
                return Ok((code != 0).then(|| (code, meaning(code, ""))));
            }
            STRUCTURED => {}
            other => return Err(wrong(format!("began an answer with {other:#x}"))),
        }
        let flags = stream.read_u16().await.map_err(ended)?;
        let kind = stream.read_u16().await.map_err(ended)?;
        is_to(request, stream.read_u64().await.map_err(ended)?)?;
        let length = stream.read_u32().await.map_err(ended)?;
        let done = flags & DONE != 0;
        if kind & ERROR != 0 {
            let said = refusal(&payload(stream, length, 2 * TEXT).await?)?;
            refused = refused.or(Some(said));
        } else {
            chunk(stream, request, into, (kind, length, done)).await?;
        }
        if done {
            break;
        }
    }
    if refused.is_none()
        && let Taken::Bytes(bytes, parts) = into
    {
        whole(parts, bytes.len() as u64)?;
    }
    Ok(refused)
}

/// Takes a part of an answer that is no error.
async fn chunk<R: AsyncRead + Unpin>(
    stream: &mut R,
    request: &Request,
    into: &mut Taken<'_>,
    (kind, length, done): (u16, u32, bool),
) -> io::Result<()> {
    match (kind, into) {
        (NOTHING, _) if length == 0 && done => Ok(()),
        (DATA, Taken::Bytes(bytes, parts)) if length > 8 => {
            let offset = stream.read_u64().await.map_err(ended)?;
            let part = place(request, bytes, parts, offset, length - 8)?;
            stream.read_exact(part).await.map_err(ended)?;
            Ok(())
        }
        (HOLE, Taken::Bytes(bytes, parts)) if length == 12 => {
            let offset = stream.read_u64().await.map_err(ended)?;
            let length = stream.read_u32().await.map_err(ended)?;
            place(request, bytes, parts, offset, length)?.fill(0);
            Ok(())
        }
        (BLOCKS, Taken::Extents(contexts)) => {
            let told = payload(stream, length, 4 + 8 * EXTENTS).await?;
            let (id, runs) = extents(&told)?;
            if contexts.len() >= 2 || contexts.iter().any(|(before, _)| *before == id) {
                return Err(wrong("told the same of extents twice"));
            }
            contexts.push((id, runs));
            Ok(())
        }
        _ => Err(wrong(format!("answered with a part of kind {kind} and {length} bytes"))),
    }
}

/// Where a part of a read belongs.
fn place<'a>(
    request: &Request,
    bytes: &'a mut [u8],
    parts: &mut Vec<(u64, u64)>,
    offset: u64,
    length: u32,
) -> io::Result<&'a mut [u8]> {
    let outside = || wrong(format!("sent {length} bytes at {offset}, which nobody asked for"));
    let from = offset.checked_sub(request.offset).ok_or_else(outside)?;
    let to = from.checked_add(length.into()).ok_or_else(outside)?;
    if length == 0 || to > bytes.len() as u64 {
        return Err(outside());
    }
    if parts.len() == PARTS {
        return Err(wrong(format!("sent a read in more than {PARTS} parts")));
    }
    parts.push((from, to));
    Ok(&mut bytes[from as usize..to as usize])
}

/// Checks that every byte has come, and came once.
fn whole(parts: &mut [(u64, u64)], length: u64) -> io::Result<()> {
    parts.sort_unstable();
    let mut reached = 0;
    for (from, to) in parts {
        if *from != reached {
            return Err(wrong("sent a byte of a read twice, or one not at all"));
        }
        reached = *to;
    }
    if reached == length { Ok(()) } else { Err(wrong("did not send all of a read")) }
}

fn is_to(request: &Request, cookie: u64) -> io::Result<()> {
    if cookie == request.cookie {
        return Ok(());
    }
    Err(wrong(format!("answered request {cookie} when {} was asked", request.cookie)))
}

/// Reads the extents of a context.
fn extents(mut told: &[u8]) -> io::Result<(u32, Runs)> {
    let id = take_u32(&mut told)?;
    let mut runs = Vec::with_capacity(told.len() / 8);
    while !told.is_empty() {
        let (length, flags) = (take_u32(&mut told)?, take_u32(&mut told)?);
        if length == 0 {
            return Err(wrong("told of an extent of no bytes"));
        }
        runs.push((u64::from(length), flags));
    }
    if runs.is_empty() { Err(wrong("told of no extent")) } else { Ok((id, runs)) }
}

/// Lays the extents of both contexts over each other, as far as both reach and `length` bytes at
/// most.
fn merged(zeroes: &[(u64, u32)], dirt: &[(u64, u32)], length: u64) -> Vec<Extent> {
    let (mut zeroes, mut dirt) = (zeroes.iter().copied(), dirt.iter().copied());
    let (mut zero, mut dirty) = (zeroes.next(), dirt.next());
    let (mut all, mut left): (Vec<Extent>, u64) = (Vec::new(), length);
    while let (Some((of_zero, is_zero)), Some((of_dirty, is_dirty))) = (zero, dirty)
        && left > 0
    {
        let length = of_zero.min(of_dirty).min(left);
        let next = Extent { length, zero: is_zero & ZERO != 0, dirty: is_dirty & DIRTY != 0 };
        match all.last_mut() {
            Some(last) if (last.zero, last.dirty) == (next.zero, next.dirty) => {
                last.length += length;
            }
            _ => all.push(next),
        }
        left -= length;
        zero = if of_zero > length { Some((of_zero - length, is_zero)) } else { zeroes.next() };
        dirty = if of_dirty > length { Some((of_dirty - length, is_dirty)) } else { dirt.next() };
    }
    all
}

/// Reads the error of a part.
fn refusal(mut told: &[u8]) -> io::Result<(u32, String)> {
    let code = take_u32(&mut told)?;
    let length = usize::from(take_u16(&mut told)?);
    let said = told.get(..length).ok_or_else(|| wrong("cut the text of an error"))?;
    if code == 0 {
        return Err(wrong("told of an error that is none"));
    }
    Ok((code, meaning(code, &words(said))))
}

fn meaning(code: u32, said: &str) -> String {
    if !said.is_empty() {
        return said.to_owned();
    }
    let known = match code {
        1 => "not permitted",
        5 => "input/output error",
        12 => "no memory",
        22 => "invalid argument",
        28 => "no space left",
        75 => "too large",
        95 => "not supported",
        108 => "it shuts down",
        _ => NO_REASON,
    };
    known.to_owned()
}

/// What a server says, fit to be shown.
fn words(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    said.chars().map(|sign| if sign.is_control() { ' ' } else { sign }).collect()
}

/// Reads what belongs to an answer, if it is not too much.
async fn payload<R: AsyncRead + Unpin>(
    stream: &mut R,
    length: u32,
    most: u32,
) -> io::Result<Vec<u8>> {
    if length > most {
        return Err(wrong(format!("sends {length} bytes where {most} are the most")));
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).await.map_err(ended)?;
    Ok(bytes)
}

/// A text with its length before it.
fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn take<const N: usize>(from: &mut &[u8]) -> io::Result<[u8; N]> {
    let (first, rest) = from.split_first_chunk().ok_or_else(|| wrong("cut an answer short"))?;
    *from = rest;
    Ok(*first)
}

fn take_u16(from: &mut &[u8]) -> io::Result<u16> {
    take(from).map(u16::from_be_bytes)
}

fn take_u32(from: &mut &[u8]) -> io::Result<u32> {
    take(from).map(u32::from_be_bytes)
}

fn take_u64(from: &mut &[u8]) -> io::Result<u64> {
    take(from).map(u64::from_be_bytes)
}
