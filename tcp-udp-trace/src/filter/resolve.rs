//! Translates the names in a filter. The programs identify processes by numbers of the initial pid
//! namespace, cgroups by their ids, and network namespaces by inode and cookie.

use std::path::{Path, PathBuf};

use super::{CgroupTree, Filter, Namespace, invalid, text::path_text};
use crate::error::Error;

/// Translates the caller's names to the ids that the programs compare.
pub(crate) trait Names {
    /// Returns the calling process's number in the initial pid namespace.
    fn own_pid(&mut self) -> Result<u32, Error>;

    /// Translates a number of the caller's pid namespace to the initial one's; `None` if the
    /// caller's pid namespace is another one and has no such process.
    fn pid(&mut self, number: u32) -> Result<Option<u32>, Error>;

    /// Returns the id of the cgroup at this path, or why there is none.
    fn cgroup(&mut self, path: &Path) -> Result<u64, String>;

    /// Returns the id of the cgroup at this path and its level, 0 for the root, or why there is
    /// none.
    fn cgroup_tree(&mut self, path: &Path) -> Result<(u64, u8), String>;

    /// Returns the path of the cgroup with this id, which [`cgroup_tree`](Self::cgroup_tree) takes,
    /// or why there is none.
    fn cgroup_path(&mut self, id: u64) -> Result<PathBuf, String>;

    /// Returns the cookie of the network namespace that has this inode now, 0 if the kernel has no
    /// cookies; `None` if there is no such namespace.
    fn netns_cookie(&mut self, inode: u32) -> Result<Option<u64>, Error>;
}

impl Filter {
    /// Translates the names, and keeps the rest.
    ///
    /// # Errors
    ///
    /// `InvalidFilter`, which names the setting, or an error of `names`.
    pub(crate) fn resolve(&self, names: &mut impl Names) -> Result<Self, Error> {
        let mut resolved = self.clone();
        for pid in &mut resolved.pids {
            let number = *pid;
            *pid = names.pid(number)?.ok_or_else(|| {
                invalid(format!(
                    "pid is {number}: no process has this number in the tracing process's \
                     pid namespace; there, the process must exist when the filter is used"
                ))
            })?;
        }
        for pid in &mut resolved.pid_trees {
            let number = *pid;
            *pid = names.pid(number)?.ok_or_else(|| {
                invalid(format!("pid_tree is {number}: there is no such process"))
            })?;
        }
        if resolved.only_self {
            resolved.pids.push(names.own_pid()?);
            resolved.only_self = false;
        }
        for path in resolved.cgroup_paths.drain(..) {
            let id = names
                .cgroup(&path)
                .map_err(|message| invalid(format!("cgroup is {}: {message}", path_text(&path))))?;
            resolved.cgroups.push(id);
        }
        for tree in &mut resolved.cgroup_trees {
            let path = names.cgroup_path(tree.id);
            let found = path.and_then(|path| names.cgroup_tree(&path));
            (_, tree.level) =
                found.map_err(|message| invalid(format!("cgroup_tree is {tree}: {message}")))?;
        }
        for path in resolved.cgroup_tree_paths.drain(..) {
            let (id, level) = names.cgroup_tree(&path).map_err(|message| {
                invalid(format!("cgroup_tree is {}: {message}", path_text(&path)))
            })?;
            resolved.cgroup_trees.push(CgroupTree { id, level });
        }
        for namespace in &mut resolved.namespaces {
            let cookie = names.netns_cookie(namespace.inode)?;
            namespace.cookie = cookie.unwrap_or(Namespace::NO_COOKIE);
        }
        Ok(resolved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// A pid namespace with the processes 1 to 9. The initial one knows them as 1001 to 1009.
    struct Child;

    impl Names for Child {
        fn own_pid(&mut self) -> Result<u32, Error> {
            Ok(1007)
        }

        fn pid(&mut self, number: u32) -> Result<Option<u32>, Error> {
            Ok((number < 10).then_some(number + 1000))
        }

        fn cgroup(&mut self, path: &Path) -> Result<u64, String> {
            match path.to_str() {
                Some("/a b") => Ok(77),
                _ => Err("there is no such cgroup".into()),
            }
        }

        fn cgroup_tree(&mut self, path: &Path) -> Result<(u64, u8), String> {
            match path.to_str() {
                Some("/c/d") => Ok((88, 2)),
                _ => Err("there is no such cgroup".into()),
            }
        }

        fn cgroup_path(&mut self, id: u64) -> Result<PathBuf, String> {
            if id == 88 {
                Ok("/c/d".into())
            } else {
                Err("there is no such cgroup".into())
            }
        }

        fn netns_cookie(&mut self, inode: u32) -> Result<Option<u64>, Error> {
            Ok((inode < 10).then_some(u64::from(inode) + 100))
        }
    }

    fn resolve(text: &str) -> Result<String, Error> {
        let filter = text.parse::<Filter>()?;
        Ok(filter.resolve(&mut Child)?.to_string())
    }

    #[test]
    fn names_become_ids_of_the_programs() {
        for (text, resolved) in [
            ("", ""),
            ("pid=1,2 uid=3", "pid=1001,1002 uid=3"),
            ("pid_tree=1 port=1", "pid_tree=1001 port=1"),
            ("only_self", "pid=1007"),
            ("pid=2 only_self", "pid=1002,1007"),
            ("exclude_self", "exclude_self"),
            (r"cgroup=5,/a\x20b", "cgroup=5,77"),
            ("cgroup_tree=88", "cgroup_tree=88"),
            ("cgroup_tree=/c/d", "cgroup_tree=88"),
        ] {
            assert_eq!(resolve(text).unwrap(), resolved, "{text}");
        }
        for text in ["cgroup_tree=88", "cgroup_tree=/c/d"] {
            let filter = text.parse::<Filter>().unwrap();
            let resolved = filter.resolve(&mut Child).unwrap();
            assert_eq!(resolved.cgroup_trees, [CgroupTree { id: 88, level: 2 }]);
            // The levels are above `last`, which is 0 without `one_in`.
            assert_eq!(resolved.compile().unwrap().argument, 3 << 32);
        }
    }

    #[test]
    fn an_inode_becomes_the_namespace_that_has_it() {
        let filter = Filter::new().netns(4).netns(10);
        let resolved = filter.resolve(&mut Child).unwrap();
        let found = resolved.namespaces.iter().map(|namespace| namespace.cookie);
        assert!(found.eq([104, Namespace::NO_COOKIE]));
        // The caller's filter is unchanged.
        assert_eq!(filter, Filter::new().netns(4).netns(10));
    }

    #[test]
    fn unknown_names_are_refused() {
        for (text, message) in [
            ("pid=1,10", "pid is 10: no process has this number in"),
            ("pid_tree=10", "pid_tree is 10: there is no such process"),
            (
                r"cgroup=/b\x20c",
                r"cgroup is /b\x20c: there is no such cgroup",
            ),
            ("cgroup_tree=7", "cgroup_tree is 7: there is no such cgroup"),
            (
                "cgroup_tree=/a",
                "cgroup_tree is /a: there is no such cgroup",
            ),
        ] {
            let error = resolve(text).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidFilter);
            assert!(error.to_string().starts_with(message), "{error}");
        }
    }
}
