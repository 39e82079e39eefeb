//! Files, sockets and other processes that stay within reach, by Landlock.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::SandboxError;

/// The newest of the kernel's rights that are asked for; one that lacks some of them does without.
const NEWEST: ABI = ABI::V10;

/// A file, or a directory with all below it, and what can still be done with it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reach {
    path: PathBuf,
    right: Right,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Right {
    /// To be executed, and read for that.
    Execute,
    /// To be removed; directories are not.
    Remove,
}

impl Right {
    fn access(self) -> BitFlags<AccessFs> {
        match self {
            Right::Execute => AccessFs::Execute | AccessFs::ReadFile,
            Right::Remove => AccessFs::RemoveFile.into(),
        }
    }
}

impl Reach {
    /// Files can be removed from this directory, and from those below it: Landlock has no way to say it of one directory alone.
    pub fn removal_in(directory: &Path) -> Reach {
        Reach { path: directory.to_owned(), right: Right::Remove }
    }

    /// This very program can be executed again, whatever becomes of its name.
    ///
    /// That is its file; and for each library that is loaded now, the loader among them, the directory that it is in: a
    /// newer one may be put in its place while this process runs.
    pub fn own_program() -> io::Result<Vec<Reach>> {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let program = std::fs::read_link("/proc/self/exe")?;
        let directories: BTreeSet<&Path> =
            executable_files(&maps).filter(|path| *path != program).filter_map(Path::parent).collect();
        let paths = directories.into_iter().chain([Path::new("/proc/self/exe")]);
        Ok(paths.map(|path| Reach { path: path.to_owned(), right: Right::Execute }).collect())
    }
}

/// The files of which a process has mapped something to be executed.
fn executable_files(maps: &str) -> impl Iterator<Item = &Path> {
    // "7f9d8dd6e000-7f9d8dec4000 r-xp 00026000 fe:00 326279     /usr/lib/x86_64-linux-gnu/libc.so.6"
    maps.lines().filter_map(|line| {
        let (before, path) = line.split_at(line.find('/')?);
        before.split(' ').nth(1)?.contains('x').then_some(Path::new(path))
    })
}

/// Leaves these within reach, and nothing else: no other file is opened, made, changed or removed by a path, no TCP port is bound or connected to, and no
/// process outside is signalled, traced, or connected to by an abstract name. What is open stays as it is.
///
/// A kernel that has not all of it does what it has. To be called while the process has one thread.
pub fn give_up_all_but(reaches: &[Reach]) -> Result<(), SandboxError> {
    let mut rules = Vec::new();
    for Reach { path, right } in reaches {
        let opened =
            PathFd::new(path).map_err(|source| SandboxError::Path { path: path.display().to_string(), source })?;
        rules.push(PathBeneath::new(opened, right.access()));
    }
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let status = ruleset.add_rules(rules.into_iter().map(Ok::<_, landlock::RulesetError>))?.restrict_self()?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => {
            log::warn!("the kernel has no Landlock, or it is off: files are guarded by their permissions alone");
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            log::debug!("the kernel has version {effective_abi} of Landlock; {NEWEST} has all that is asked for");
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_executes_is_found_in_its_maps() {
        let maps = "\
55e3df5e0000-55e3df5e2000 r-xp 00000000 fe:00 1                          /usr/bin/pando-blk
55e3df5e2000-55e3df5e3000 r--p 00002000 fe:00 2                          /usr/share/never-executed
7f9d8dd6e000-7f9d8dec4000 r-xp 00026000 fe:00 3                          /usr/lib/a place/libc.so.6
7ffd9681bc70-7ffd9681bd70 r-xp 00000000 00:00 0                          [vdso]
7f9d8e000000-7f9d8e001000 r-xp 00000000 00:00 0 
";
        let found: Vec<&Path> = executable_files(maps).collect();
        assert_eq!(found, [Path::new("/usr/bin/pando-blk"), Path::new("/usr/lib/a place/libc.so.6")]);
    }

    #[test]
    fn this_program_and_its_libraries_are_within_reach() {
        let reaches = Reach::own_program().unwrap();
        assert!(reaches.iter().any(|reach| reach.path == Path::new("/proc/self/exe")));
        assert!(reaches.iter().all(|reach| reach.right == Right::Execute && reach.path.exists()), "{reaches:?}");
    }
}
