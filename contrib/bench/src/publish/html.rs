//! The page: tables and plots, one file, no script, readable in light and dark. Well-formed as XML, too.

use std::fmt::Write;

use super::chart::Chart;
use super::svg::escape;
use super::{labels, name_of};
use crate::compare::QUIET;
use crate::goals::{reached, verdict};
use crate::results::{Results, Spread};

const STYLE: &str = "\
:root{color-scheme:light dark}\
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;background:#fff;color:#1f2328}\
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}\
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #d8dee4;white-space:nowrap}\
th:first-child,td:first-child,td.text,th.text{text-align:left}\
.small,pre{font-size:13px;color:#656d76;white-space:pre-wrap;overflow-wrap:anywhere}\
.PASS{color:#1a7f37}.MISS{color:#cf222e;font-weight:600}.noisy{opacity:.55}\
svg{max-width:100%;height:auto;margin:1em 0}\
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th,td{border-color:#2d333b}\
.small,pre{color:#9198a1}.PASS{color:#3fb950}.MISS{color:#f85149}}";

/// Appends; a String takes everything.
macro_rules! put {
    ($page:expr, $($rest:tt)*) => {
        writeln!($page, $($rest)*).expect("a String takes everything")
    };
}

/// The whole page.
pub fn page(results: &Results, plots: &[Chart]) -> String {
    let mut page = String::new();
    put!(page, "<!DOCTYPE html>");
    put!(
        page,
        "<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\"><head><meta charset=\"utf-8\"/>"
    );
    put!(page, "<meta name=\"viewport\" content=\"width=device-width\"/>");
    put!(page, "<title>vhost-user-blk: the bench</title><style>{STYLE}</style></head><body>");
    put!(page, "<h1>vhost-user-blk back ends, measured</h1>");
    put!(page, "<p>{}, {}</p>", escape(&results.machine), escape(&results.date));
    put!(page, "<pre>$ {}", escape(&results.command_line));
    for line in results.versions.iter().chain(&results.commands) {
        put!(page, "{}", escape(line));
    }
    put!(page, "</pre>");
    put!(
        page,
        "<p class=\"small\">Back ends ran in turn, on the same disk with the same job. Numbers are medians; in brackets \
         the least and the most. CPU is the back end's whole process, per request. Rows in grey (hollow in plots) \
         were disturbed: others used more than {QUIET} CPUs.{}</p>",
        results.syscalls_note.as_ref().map_or(String::new(), |note| {
            format!(" System calls were not counted: {}.", escape(note))
        })
    );
    goals(&mut page, results);
    put!(page, "<h2>Plots</h2>");
    plots.iter().for_each(|plot| page.push_str(&plot.svg()));
    cases(&mut page, results);
    processes(&mut page, results);
    guest(&mut page, results);
    bars(&mut page, results);
    put!(page, "</body></html>");
    page
}

fn heading(page: &mut String, title: &str, columns: &[&str]) {
    put!(page, "<h2>{title}</h2><table><tr>");
    for column in columns {
        put!(page, "<th>{column}</th>");
    }
    put!(page, "</tr>");
}

fn figure(measured: Option<f64>) -> String {
    measured.map_or("-".into(), |m| format!("{m:.3}"))
}

fn goals(page: &mut String, results: &Results) {
    if results.goals.is_empty() {
        return;
    }
    heading(page, "Goals", &["goal", "bar", "measured", "", "reach for"]);
    for goal in &results.goals {
        let verdict = verdict(goal.pass);
        put!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"{verdict}\">{verdict}</td><td class=\"text\">{}</td></tr>",
            escape(&goal.goal),
            escape(&goal.bar),
            figure(goal.measured),
            escape(&reached(goal))
        );
    }
    put!(page, "</table>");
}

fn bars(page: &mut String, results: &Results) {
    if results.bars.is_empty() {
        return;
    }
    heading(page, "Bars of earlier issues", &["bar", "wanted", "measured", ""]);
    for bar in &results.bars {
        let verdict = verdict(bar.pass);
        put!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"{verdict}\">{verdict}</td></tr>",
            escape(&bar.bar),
            escape(&bar.wanted),
            figure(bar.measured)
        );
    }
    put!(page, "</table>");
}

fn cases(page: &mut String, results: &Results) {
    if results.series.is_empty() {
        return;
    }
    let columns = [
        "case",
        "back end",
        "IOPS",
        "MB/s",
        "CPU us/io",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "syscalls/io",
        "switches/io",
    ];
    heading(page, "All cases", &columns);
    for s in &results.series {
        let class = if s.foreign_cpus.median > QUIET { " class=\"noisy\"" } else { "" };
        let us = |s: Spread| format!("{:.2}", s.median / 1e3);
        let syscalls = s.syscalls.map_or("-".into(), |n| format!("{:.3}", n.median));
        put!(
            page,
            "<tr{class}><td>{}</td><td class=\"text\">{}</td><td>{:.0} ({:.0}..{:.0})</td><td>{:.0}</td>\
             <td>{} ({:.2}..{:.2})</td><td>{}</td><td>{}</td><td>{}</td><td>{syscalls}</td><td>{:.3}</td></tr>",
            escape(&s.case),
            escape(&name_of(results, &s.backend)),
            s.iops.median,
            s.iops.min,
            s.iops.max,
            s.mb_per_s.median,
            us(s.cpu_ns),
            s.cpu_ns.min / 1e3,
            s.cpu_ns.max / 1e3,
            us(s.p50_ns),
            us(s.p99_ns),
            us(s.p999_ns),
            s.switches.median
        );
    }
    put!(page, "</table>");
}

fn processes(page: &mut String, results: &Results) {
    if results.idle.is_empty() {
        return;
    }
    let columns =
        ["back end", "start ms", "RSS MiB listening", "connected", "idle CPU %", "switches/s"];
    heading(page, "Start, memory, idling (16 queues)", &columns);
    let mib = |kib: u64| kib as f64 / 1024.0;
    for i in &results.idle {
        put!(
            page,
            "<tr><td>{}</td><td>{:.1} ({:.1}..{:.1})</td><td>{:.1}</td><td>{:.1}</td><td>{:.3}</td><td>{:.1}</td></tr>",
            escape(&name_of(results, &i.backend)),
            i.listening_ms.median,
            i.listening_ms.min,
            i.listening_ms.max,
            mib(i.rss_listening.total_kib),
            mib(i.rss_connected.total_kib),
            i.cpu_percent,
            i.switches_per_s
        );
    }
    put!(page, "</table>");
    if !results.large.is_empty() {
        heading(
            page,
            "qcow2 image of 1 TiB",
            &["back end", "image", "open ms", "RSS MiB", "all L2 cached"],
        );
        for l in &results.large {
            put!(
                page,
                "<tr><td>{}</td><td class=\"text\">{}</td><td>{:.1} ({:.1}..{:.1})</td><td>{:.1}</td><td>{}</td></tr>",
                escape(&name_of(results, &l.backend)),
                if l.empty { "empty" } else { "allocated" },
                l.listening_ms.median,
                l.listening_ms.min,
                l.listening_ms.max,
                mib(l.rss.total_kib),
                l.rss_covered.map_or("-".into(), |r| format!("{:.1}", mib(r.total_kib)))
            );
        }
        put!(page, "</table>");
    }
    if !results.many.is_empty() {
        let columns = [
            "back end",
            "exports",
            "idle CPU %",
            "switches/s",
            "IOPS, each at depth 1",
            "fastest / slowest",
        ];
        heading(page, "Many exports of one process", &columns);
        for m in &results.many {
            put!(
                page,
                "<tr><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.1}</td><td>{:.0} ({:.0}..{:.0})</td>\
                 <td>{:.2} ({:.2}..{:.2})</td></tr>",
                escape(&name_of(results, &m.backend)),
                m.exports,
                m.idle_cpu_percent,
                m.idle_switches_per_s,
                m.iops.median,
                m.iops.min,
                m.iops.max,
                m.unfairness.median,
                m.unfairness.min,
                m.unfairness.max
            );
        }
        put!(page, "</table>");
    }
}

fn guest(page: &mut String, results: &Results) {
    if results.guest.is_empty() {
        return;
    }
    let columns = [
        "job",
        "back end",
        "IOPS",
        "MB/s",
        "mean us",
        "p99 us",
        "CPU us/io",
        "syscalls/io",
        "switches/io",
    ];
    heading(page, "fio in a guest", &columns);
    let order = labels(results);
    let mut runs: Vec<_> = results.guest.iter().collect();
    let place = |label: &str| order.iter().position(|l| *l == label);
    runs.sort_by(|x, y| x.job.cmp(&y.job).then(place(&x.backend).cmp(&place(&y.backend))));
    for r in runs {
        put!(
            page,
            "<tr><td>{}</td><td class=\"text\">{}</td><td>{:.0}</td><td>{:.1}</td><td>{:.0}</td><td>{:.0}</td>\
             <td>{:.2}</td><td>{}</td><td>{:.3}</td></tr>",
            escape(&r.job),
            escape(&name_of(results, &r.backend)),
            r.iops,
            r.mb_per_s,
            r.lat_mean_us,
            r.lat_p99_us,
            r.cpu_ns / 1e3,
            r.syscalls.map_or("-".into(), |n| format!("{n:.3}")),
            r.switches
        );
    }
    put!(page, "</table>");
}
