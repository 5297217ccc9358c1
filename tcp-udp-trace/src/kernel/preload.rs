//! Loads programs ahead of their turn, on every CPU at once.

use std::{collections::HashMap, sync::Mutex, thread};

use aya::Ebpf;

use super::{
    btf::ids::{self, Ids},
    control::load_control,
    iter::IterProgram,
    plan::HookPoint,
    program::load,
};
use crate::lock::lock;

/// Loads the programs of `hooks`, which will probably be attached, and others, on every CPU at
/// once, because the kernel's verifier takes most of a start. A program that fails here is loaded
/// again at its turn, and then the error is reported.
pub(super) fn load_ahead(
    ebpf: &mut Ebpf,
    hooks: &[(&str, HookPoint)],
    iters: &[IterProgram],
    controls: &[&str],
    ids: &Ids,
) {
    let mut programs: HashMap<_, _> = ebpf.programs_mut().collect();
    let hooks = hooks.iter();
    let hooks = hooks.filter_map(|(name, point)| Some((*point, programs.remove(name)?)));
    let (with_ids, others): (Vec<_>, Vec<_>) =
        hooks.partition(|(point, _)| point.target().is_some());
    let mut take = |name: &&str| programs.remove(*name);
    let controls: Vec<_> = controls.iter().filter_map(&mut take).collect();
    let iters: Vec<_> = iters
        .iter()
        .filter_map(|iter| Some((iter, take(&iter.program)?)))
        .collect();
    let targets = with_ids.iter().filter_map(|(point, _)| point.target());
    let targets = targets.chain(iters.iter().map(|(iter, _)| iter.target()));
    let targets: Vec<_> = targets.collect();
    // Making the ids takes as long as loading a program, so it is one of the jobs.
    let load_with_ids = || {
        let Ok(ids) = ids::for_aya(ids, &targets) else {
            return;
        };
        for (point, program) in with_ids {
            let _ = load(program, point, Some(&ids));
        }
        for (iter, program) in iters {
            let _ = iter.load(program, &ids);
        }
    };
    let mut jobs: Vec<Box<dyn FnOnce() + Send>> = vec![Box::new(load_with_ids)];
    for (point, program) in others {
        jobs.push(Box::new(move || drop(load(program, point, None))));
    }
    for program in controls {
        jobs.push(Box::new(move || drop(load_control(program))));
    }
    let threads = jobs
        .len()
        .min(thread::available_parallelism().map_or(1, usize::from));
    let jobs = Mutex::new(jobs.into_iter());
    let next = || lock(&jobs).next();
    let work = || {
        while let Some(job) = next() {
            job();
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without that thread, the work takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}
