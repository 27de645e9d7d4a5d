//! The simulator: the real manager, plan, store client and agents over fake drivers, in virtual time. Not built yet;
//! `docs/decisions/0001-first-slice.md` says what it waits for.
fn main() {
    eprintln!("the simulator is not built yet; see docs/decisions/0001-first-slice.md");
    std::process::exit(2);
}
