//! Encrypted disks (docs/decisions/0030-encrypted.md): how QEMU's programs are told the key of one, and the head of those that are
//! nothing but LUKS.
//!
//! ```text
//!   qcow2   QEMU keeps LUKS inside: the head is a part of the file, made with it
//!   raw     head (2,068,480 bytes) │ what the guest wrote, AES-256-XTS, sector by sector
//! ```
//!
//! **The head of a raw one is a function of the disk's key.** Every host that ever makes it makes the same bytes, so it does not
//! matter who was first, whether a daemon died half-way, or whether it is written once more over a disk that holds something: it is
//! what stands there already. Replicas are the same byte for byte, and nothing has to be sent. Another head (`qemu-img create -f
//! luks`) has a random key of its own in it; written twice it is the end of the disk.
//!
//! The layout is that of LUKS 1 (the "LUKS1 On-Disk Format Specification", version 1.2.3), as QEMU and `cryptsetup` read it. The
//! disk's key has 256 random bits, so what slows guessing down (PBKDF2) gains nothing and is at its least.

use super::{qemu_img::Failure, says};
use crate::agent::storage::StorageFailure;
use aws_lc_rs::{
    cipher::{AES_256, EncryptingKey, UnboundCipherKey},
    error::Unspecified,
    hkdf::{HKDF_SHA256, KeyType, Salt},
    pbkdf2,
};
use haven_model::volume::LUKS_HEAD_BYTES;
use haven_store::seal::Plain;
use sha2::{Digest, Sha256};
use std::{
    fs::OpenOptions,
    io,
    num::NonZeroU32,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

/// How every head begins: the magic of LUKS, and version 1.
const MAGIC: &[u8; 8] = b"LUKS\xba\xbe\x00\x01";
const SECTOR: usize = 512;
/// Both halves of AES-256-XTS, bytes.
const KEY_BYTES: usize = 64;
/// Into so many parts the key of the content is split in its slot.
const STRIPES: usize = 4000;
/// The slots, and how many sectors from one to the next: their content, brought to 4 KiB.
const SLOTS: usize = 8;
const SLOT_SECTORS: usize = 504;
/// Where the first begins, sectors.
const FIRST_SLOT: usize = 8;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
/// The least that the format lets.
const ITERATIONS: u32 = 1000;
/// How many bytes [`MAGIC`] to the last slot's description are.
const DESCRIBED: usize = 592;

/// The id of the secret by which the programs know the key.
pub const SECRET: &str = "key";
/// Where a program reads it: what it gets at its standard input.
const INPUT: &str = "/proc/self/fd/0";

/// The argument of `--object` by which a program reads the key that it gets at its standard input: neither its arguments nor any file
/// hold it.
#[must_use]
pub fn secret() -> String {
    format!("secret,id={SECRET},file={INPUT}")
}

/// A file as `--image-opts` names it, with its key.
///
/// # Errors
/// When the path is none that QEMU takes.
pub fn opened(path: &Path, format: &str) -> Result<String, StorageFailure> {
    let text = super::qemu_img::text(path)?.replace(',', ",,");
    Ok(match format {
        "qcow2" => format!(
            "driver=qcow2,encrypt.format=luks,encrypt.key-secret={SECRET},file.driver=file,file.filename={text}"
        ),
        _ => format!("driver=luks,key-secret={SECRET},file.driver=file,file.filename={text}"),
    })
}

/// What `qemu-img create -o` is told for a `qcow2` file.
#[must_use]
pub fn created() -> String {
    // The key is as random as what it protects; more rounds would only hold QEMU up at each opening.
    format!("encrypt.format=luks,encrypt.key-secret={SECRET},encrypt.iter-time=10")
}

/// What is said of a failure, if it is that of a key which is not this disk's.
#[must_use]
pub fn in_words(said: &str, path: &Path) -> Option<String> {
    let wrong = [
        "Invalid password",
        "cannot unlock any keyslot",
        "No key available",
        "Volume is not in LUKS format",
    ];
    wrong.iter().any(|sign| said.contains(sign)).then(|| {
        format!(
            "the key that the cluster has for {} does not open it ({}); nothing was changed in it: it is another disk's file, or its record under {} was altered",
            path.display(),
            said.trim(),
            haven_model::keys::DISK_KEYS
        )
    })
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// Bytes that follow from the disk's key, for one purpose.
fn derived<const N: usize>(key: &Plain, purpose: &str) -> Result<[u8; N], Unspecified> {
    let mut bytes = [0; N];
    let extracted = Salt::new(HKDF_SHA256, &[]).extract(key.expose().as_bytes());
    let info = [b"haven disk v1".as_slice(), &[0], purpose.as_bytes()];
    extracted.expand(&info, Length(N))?.fill(&mut bytes)?;
    Ok(bytes)
}

fn ecb(key: &[u8]) -> Result<EncryptingKey, Unspecified> {
    EncryptingKey::ecb(UnboundCipherKey::new(&AES_256, key)?)
}

/// So many bytes that follow from a key: the numbers of their blocks, encrypted.
fn stream(key: &[u8], length: usize) -> Result<Vec<u8>, Unspecified> {
    let blocks = 0..length.div_ceil(16) as u128;
    let mut bytes: Vec<u8> = blocks.flat_map(u128::to_be_bytes).collect();
    ecb(key)?.encrypt(&mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Encrypts whole sectors, of which the first has this number (IEEE 1619, the number as `plain64`).
fn encrypt(key: &[u8; KEY_BYTES], first: u64, sectors: &mut [u8]) -> Result<(), Unspecified> {
    let (content, tweak) = key.split_at(KEY_BYTES / 2);
    let numbers = (first..).take(sectors.len() / SECTOR);
    let mut tweaks: Vec<u8> = numbers.flat_map(|n| u128::from(n).to_le_bytes()).collect();
    ecb(tweak)?.encrypt(&mut tweaks)?;
    let mut masks = Vec::with_capacity(sectors.len());
    for begin in tweaks.chunks_exact(16) {
        let mut mask = u128::from_le_bytes(begin.try_into().map_err(|_| Unspecified)?);
        for _ in 0..SECTOR / 16 {
            masks.extend(mask.to_le_bytes());
            mask = mask << 1 ^ if mask >> 127 == 1 { 0x87 } else { 0 };
        }
    }
    let mix = |sectors: &mut [u8]| sectors.iter_mut().zip(&masks).for_each(|(a, b)| *a ^= b);
    mix(sectors);
    ecb(content)?.encrypt(sectors)?;
    mix(sectors);
    Ok(())
}

/// Spreads what stands in a block over all of it.
fn diffuse(block: &mut [u8; KEY_BYTES]) {
    for (number, part) in (0u32..).zip(block.chunks_exact_mut(32)) {
        let hash = Sha256::new().chain_update(number.to_be_bytes()).chain_update(&*part);
        part.copy_from_slice(&hash.finalize());
    }
}

/// Splits a key so that it is lost with any part of what it was split into.
fn split(secret: &[u8; KEY_BYTES], filling: Vec<u8>) -> Vec<u8> {
    let (mut whole, mut block) = (filling, [0; KEY_BYTES]);
    for stripe in whole.chunks_exact(KEY_BYTES) {
        block.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
        diffuse(&mut block);
    }
    whole.extend(block.iter().zip(secret).map(|(a, b)| a ^ b));
    whole
}

fn slow(secret: &[u8], salt: &[u8], out: &mut [u8]) {
    let rounds = NonZeroU32::new(ITERATIONS).unwrap_or(NonZeroU32::MIN);
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, secret, out);
}

fn made(key: &Plain) -> Result<Vec<u8>, Unspecified> {
    let content: [u8; KEY_BYTES] = derived(key, "content")?;
    let (digest_salt, slot_salt): ([u8; 32], [u8; 32]) =
        (derived(key, "digest salt")?, derived(key, "slot salt")?);
    let number: [u8; 16] = derived(key, "uuid")?;
    let mut head = vec![0; LUKS_HEAD_BYTES as usize];
    let described = {
        let mut to: Vec<u8> = MAGIC.to_vec();
        for name in ["aes", "xts-plain64", "sha256"] {
            let mut field = [0; 32];
            field[..name.len()].copy_from_slice(name.as_bytes());
            to.extend(field);
        }
        let payload = LUKS_HEAD_BYTES as u32 / SECTOR as u32;
        to.extend(payload.to_be_bytes());
        to.extend((KEY_BYTES as u32).to_be_bytes());
        let mut digest = [0; 20];
        slow(&content, &digest_salt, &mut digest);
        to.extend(digest);
        to.extend(digest_salt);
        to.extend(ITERATIONS.to_be_bytes());
        let mut named = [0; 40];
        let text = uuid::Builder::from_random_bytes(number).into_uuid().hyphenated().to_string();
        named[..text.len()].copy_from_slice(text.as_bytes());
        to.extend(named);
        for slot in 0..SLOTS {
            let used = slot == 0;
            to.extend(if used { ENABLED } else { DISABLED }.to_be_bytes());
            to.extend(if used { ITERATIONS } else { 0 }.to_be_bytes());
            to.extend(if used { slot_salt } else { [0; 32] });
            to.extend(((FIRST_SLOT + slot * SLOT_SECTORS) as u32).to_be_bytes());
            to.extend((STRIPES as u32).to_be_bytes());
        }
        to
    };
    head[..DESCRIBED].copy_from_slice(&described);
    let filling: [u8; 32] = derived(key, "split")?;
    let mut slot = split(&content, stream(&filling, KEY_BYTES * (STRIPES - 1))?);
    let mut unlocks = [0; KEY_BYTES];
    slow(key.expose().as_bytes(), &slot_salt, &mut unlocks);
    encrypt(&unlocks, 0, &mut slot)?;
    let begin = FIRST_SLOT * SECTOR;
    head[begin..begin + slot.len()].copy_from_slice(&slot);
    Ok(head)
}

/// The head of a disk with this key; the same bytes each time.
///
/// # Errors
/// When the machine's cryptography does not work.
pub fn head(key: &Plain) -> Result<Vec<u8>, StorageFailure> {
    made(key).map_err(|_| says("the head of an encrypted disk cannot be made: the cryptography of this machine does not work"))
}

/// Puts the head on a file that is being made, and that nobody has open.
///
/// # Errors
/// When the file does not take it.
pub fn put_head(path: &Path, head: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.write_all_at(head, 0)
}

/// Whether a file that is there begins with this head. One that does not is never given it: it is another disk's.
///
/// # Errors
/// A sentence, when it does not, or cannot be read.
pub fn has_head(path: &Path, head: &[u8]) -> Result<(), StorageFailure> {
    let read = || {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let mut found = vec![0; head.len()];
        file.read_exact_at(&mut found, 0).map(|()| found)
    };
    let found = read().map_err(|error| {
        says(format!("the head of {} cannot be read ({error}); check its disk", path.display()))
    })?;
    if found == head {
        return Ok(());
    }
    let why = match found.starts_with(MAGIC) {
        true => "it is encrypted under another key",
        false => "it is not encrypted",
    };
    Err(says(format!(
        "{} does not begin as this encrypted disk does: {why}; nothing was changed in it. Another disk may be mounted there; mount the right one, or remove this file on this host alone: it is copied anew once it counts no more",
        path.display()
    )))
}

/// The failure of a program on an encrypted file, in words.
#[must_use]
pub fn told(failure: Failure, path: &Path) -> Failure {
    match failure {
        Failure::Other(failure) => match in_words(&failure.what, path) {
            Some(words) => says(words).into(),
            None => failure.into(),
        },
        full => full,
    }
}

#[cfg(test)]
mod tests {
    use super::{encrypt, has_head, head, put_head};
    use haven_model::volume::LUKS_HEAD_BYTES;
    use haven_store::seal::Plain;
    use sha2::{Digest, Sha256};
    use std::{io::Write, os::unix::fs::FileExt, path::Path, process::Stdio};

    fn key(of: u8) -> Plain {
        Plain::new(format!("{of:02x}").repeat(32))
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    /// IEEE 1619-2007, vector 10, of which the first block and the last are told here.
    #[test]
    fn sectors_are_encrypted_as_the_standard_says() {
        let data = "2718281828459045235360287471352662497757247093699959574966967627";
        let tweak = "3141592653589793238462643383279502884197169399375105820974944592";
        let whole: [u8; 64] = hex(&format!("{data}{tweak}")).try_into().unwrap();
        let mut sector: Vec<u8> = (0..512).map(|i| (i % 256) as u8).collect();
        encrypt(&whole, 0xff, &mut sector).unwrap();
        assert_eq!(sector[..16], hex("1c3b3a102f770386e4836c99e370cf9b"));
        assert_eq!(sector[16..32], hex("ea00803f5e482357a4ae12d414a3e63b"));
    }

    /// The head never changes: what was written under it could not be read any more.
    #[test]
    fn the_head_follows_from_the_key() {
        let one = head(&key(7)).unwrap();
        assert_eq!(one.len() as u64, LUKS_HEAD_BYTES);
        assert_eq!(one, head(&key(7)).unwrap());
        assert_ne!(one, head(&key(8)).unwrap());
        let print: String =
            Sha256::digest(&one).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(print, "f13d0053629e47fc");
    }

    fn qemu(program: &str, args: &[&str], key: &Plain) -> Option<(bool, String)> {
        let mut command = std::process::Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().ok()?;
        child.stdin.take().unwrap().write_all(key.expose().as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        let said = [done.stdout, done.stderr].concat();
        Some((done.status.success(), String::from_utf8_lossy(&said).into_owned()))
    }

    #[test]
    fn qemu_opens_what_is_made_here_with_the_key_and_with_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(LUKS_HEAD_BYTES + (8 << 20)).unwrap();
        let made = head(&key(7)).unwrap();
        put_head(&path, &made).unwrap();
        has_head(&path, &made).unwrap();
        let of = super::opened(&path, "raw").unwrap();
        let (secret, write) = (super::secret(), "write -P 0xab 1M 64k");
        let args = ["--object", &secret, "--image-opts", &of, "-c", write];
        let Some((well, said)) = qemu("qemu-io", &args, &key(7)) else {
            println!("skipped: needs qemu-io (package qemu-utils)");
            return;
        };
        assert!(well, "{said}");
        let holds = std::fs::read(&path).unwrap();
        assert!(!holds.windows(64).any(|part| part == [0xab; 64]), "it lies there in clear");
        // Written once more, as by another host or after a crash, it changes nothing.
        put_head(&path, &head(&key(7)).unwrap()).unwrap();
        assert!(holds == std::fs::read(&path).unwrap());
        let read = ["--object", &secret, "--image-opts", &of, "-c", "read -P 0xab 1M 64k"];
        let (well, said) = qemu("qemu-io", &read, &key(7)).unwrap();
        assert!(well && !said.contains("failed"), "{said}");
        let (well, said) = qemu("qemu-io", &read, &key(8)).unwrap();
        assert!(!well, "{said}");
        let words = super::in_words(&said, &path).expect("it is told in words");
        assert!(
            words.contains("does not open it") && words.contains("nothing was changed"),
            "{words}"
        );
        // What is encrypted here is what QEMU encrypts: sector 2048 of the content.
        let told = ["info", "--output=json", "--object", &secret, "--image-opts", &of];
        let (_, told) = qemu("qemu-img", &told, &key(7)).unwrap();
        assert!(told.contains("\"virtual-size\": 8388608"), "{told}");
    }

    #[test]
    fn a_file_of_another_disk_is_never_given_a_head() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        let mine = head(&key(7)).unwrap();
        let says = |path: &Path| has_head(path, &mine).unwrap_err().what;
        assert!(says(&path).contains("it is not encrypted"));
        put_head(&path, &head(&key(8)).unwrap()).unwrap();
        assert!(says(&path).contains("under another key"));
        file.write_all_at(&mine, 0).unwrap();
        file.write_all_at(&[9], 300_000 / 2).unwrap();
        assert!(says(&path).contains("under another key"), "one byte is enough");
        assert!(says(&directory.path().join("none")).contains("cannot be read"));
    }
}
