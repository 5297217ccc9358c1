//! Shows the figures, as Markdown and as a drawing.

use std::{fmt::Write as _, fs, thread};

use crate::{figures::Figures, subject::Subject, workload::Workload};

/// Returns a description of the machine.
pub(crate) fn machine() -> anyhow::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel = release.split('-').next().unwrap_or_default();
    let info = fs::read_to_string("/proc/cpuinfo")?;
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model
        .unwrap_or("unknown")
        .trim_start_matches([' ', '\t', ':']);
    let cpus = thread::available_parallelism()?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default();
    println!(
        "Linux {}, {cpus} CPUs ({model}), load at the start {load}",
        kernel
    );
    Ok(())
}

pub(crate) fn workload(workload: &Workload, subjects: &[Subject], figures: &[Figures]) {
    println!(
        "\n### {}: {} {}\n",
        workload.name, workload.units, workload.unit
    );
    println!(
        "| tracer | {} a second, thousands | kept, % | kernel ns per event | runs per event | reported, % of the truth | \
         lost, by its own count | CPU µs per event | of that in user mode | peak RSS, MB | ready, ms | `start`, ms |\n|---|---|---|---|---|---|---|---|---|---|---|---|",
        workload.unit
    );
    for (subject, figures) in subjects.iter().zip(figures) {
        let Figures {
            rate,
            kept,
            ns,
            runs,
            cpu_us,
            user_us,
            rss_mb,
            ready_ms,
            start_ms,
            seen,
            lost,
        } = figures;
        let thousands = rate.median().unwrap_or(0.0) / 1e3;
        print!("| {} | {thousands:.1} | {kept:.0} ", subject.name());
        // The process of the floor is not a useful comparison.
        let own = match subject {
            Subject::Nothing | Subject::Floor(..) => "| | | |".to_owned(),
            _ => format!("| {rss_mb:.1} | {ready_ms:.1} | {start_ms:.1} |"),
        };
        if *subject == Subject::Nothing {
            println!("| | | | | | {own}");
        } else if workload.events_each > 0 {
            println!(
                "| {ns:.0} | {runs:.2} | {seen:.2} | {lost} | {cpu_us:.2} | {user_us:.2} {own}"
            );
        } else {
            println!("| | | | {lost} | | {own}");
        }
    }
}

/// Draws bars: the rate kept under each tracer, with its least and its most.
pub(crate) fn svg(plotted: &[(Workload, Vec<Subject>, Vec<Figures>)]) -> String {
    const LABEL: f64 = 310.0;
    const BAR: f64 = 380.0;
    const ROW: f64 = 20.0;
    let mut body = String::new();
    let mut y = 40.0;
    for (workload, subjects, figures) in plotted {
        y += ROW / 2.0;
        let _ = writeln!(
            body,
            r#"<text x="10" y="{y}" font-weight="bold">{}</text>"#,
            workload.name
        );
        for (subject, figures) in subjects.iter().zip(figures) {
            let (Some(kept), Some((least, most))) = (figures.kept.median(), figures.kept.range())
            else {
                continue;
            };
            y += ROW;
            let colour = match subject {
                Subject::Nothing => "#bbb",
                Subject::Ours(_) => "#2a7",
                Subject::Floor(..) => "#89c",
                Subject::Peer(_) => "#c76",
            };
            // The noise reaches 120 % at most.
            let at = |percent: f64| BAR * percent.min(120.0) / 120.0;
            let middle = y - 4.5;
            let _ = writeln!(
                body,
                r#"<text x="{}" y="{y}" text-anchor="end">{}</text><rect x="{LABEL}" y="{}" width="{:.1}" height="13" fill="{colour}"/><path d="M{:.1} {middle}H{:.1}" stroke="black"/><text x="{:.1}" y="{y}">{kept:.0} %</text>"#,
                LABEL - 8.0,
                subject.name(),
                y - 11.0,
                at(kept),
                LABEL + at(least),
                LABEL + at(most),
                LABEL + at(kept.max(most)) + 6.0,
            );
        }
        y += ROW;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{y:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">Rate kept, % of that without a tracer: median, least and most</text>\n{body}</svg>\n",
        LABEL + BAR + 60.0
    )
}
