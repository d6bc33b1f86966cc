//! What `--help`, `--version` and `--print-capabilities` print.
#![forbid(unsafe_code)]

/// The name in front of every error.
pub const PROGRAM: &str = "vhost-user-blk";

/// One line that says "version X.Y.Z", as tools expect it, and what it can stand in for.
pub fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!("{PROGRAM} version {version} (command line of qemu-storage-daemon 10.0)\n")
}

/// The answer to `--print-capabilities`: QEMU's docs/interop/vhost-user.json.
pub const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

/// The help.
pub const HELP: &str = r#"Usage: vhost-user-blk [options]
       vhost-user-blk check [-r leaks|all] [options] IMAGE      (see check --help)
       vhost-user-blk top --metrics ADDRESS [options]           (see top --help)
Serves disk images to virtual machines over vhost-user. Takes the command line of
qemu-storage-daemon, processed in order; long options may have one dash or two.

  --blockdev [driver=]<driver>,node-name=<name>[,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap][,active=on|off]
             [,<options of the driver>...]
  --blockdev '{"driver":"<driver>","node-name":"<name>",...}'
                         define a block node

  --export [type=]vhost-user-blk,id=<id>,node-name=<name>,
           addr.type=unix,addr.path=<path>[,addr.abstract=on|off]
  --export [type=]vhost-user-blk,id=<id>,node-name=<name>,
           addr.type=fd,addr.str=<number, or systemd's name of a listening socket>
           [,writable=on|off]              guests may write (default off)
           [,writethrough=on|off]          every write is stable when it completes (off)
           [,num-queues=<n>]               queues offered (16)
           [,queue-size=<n>]               largest ring, a power of 2, 16 to 1024 (256)
           [,logical-block-size=<size>]    512 to 2M (512)
           [,serial=<text>]                at most 20 bytes (vhost_user_blk)
           [,threads=<n>]                  workers (one for each queue, at most one
                                           for each processor of the host)
           [,poll-max-ns=<n>]              longest busy wait, 0 = none (32768); up to
                                           100000 while that pays
           [,activate=start|auto]          auto: image open and locked only while the
                                           guest uses it, for migration (start)
           [,allow-inactive=on|off]        serve a node with active=off: unusable until
                                           activated (off)
           [,rerror=<policy>][,werror=<policy>]
                                           when the storage fails: report (the default),
                                           ignore, enospc (wait for space, else report),
                                           stop (wait for SIGUSR1), auto (as QEMU)
           [,iothread=<id>][,fixed-iothread=on|off]
                                           take poll-max-ns from that object
                         offer a block node to a guest; `id` may be left out
                         where there is only one export

  --object help          list the types of objects
  --object <type>,help   list the properties of a type
  --object iothread,id=<id>[,poll-max-ns=<n>]...
  --object secret,id=<id>,data=<text>|file=<path>[,format=raw|base64]
                         define an object

  --pidfile <path>       write the process number to a file once all is set up
  --daemonize            go to the background once all is set up
  -T, --trace <...>      accepted and ignored; see --log-level
  -V, --version          print the version
  -h, --help             print this

As QEMU's conventions for vhost-user back ends have it:
  --socket-path=<path>   serve the one root of the graph here, writable
  --fd=<number>          the same on an inherited socket, listening or connected
  --blk-file=<path>      define the node to serve: this file or block device
  --format=<driver>      its format (raw); never probed
  --read-only            guests may not write
  --node-name=<name>     serve this node instead
  --print-capabilities   print what a management layer asks for

More:
  --socket-mode=<octal>  permissions of the sockets, e.g. 0660 (as the umask has it)
  --log-level=<level>    error, warn, info, debug, trace, or as RUST_LOG (warn)
  --print-graph[=text|json|dot]
                         open the block nodes, print them, and end
  --state-dir=<dir>|none where unflushed writes of qcow2 images are recorded, so that they
                         survive a crash of this program (vhost-user-blk[-UID] in
                         $XDG_RUNTIME_DIR, else in /run, else in /dev/shm)
  --strict-formats       never guess the format of a backing file
  --control=<path>       listen here for a successor of the same user (mode 0600)
  --take-over=<path>     be the successor of the process that listens there: serve what
                         it serves, with its command line (besides --daemonize and
                         --log-level nothing else may be given); guests see a pause.
                         It ends when all is taken over; if that fails, it goes on
  --metrics=<path>|unix:<path>|<host>:<port>
                         serve counters here as OpenMetrics text over HTTP: a socket of
                         mode 0600, or a port of the loopback interface; for Prometheus,
                         and for vhost-user-blk top
  --user=<name|number>, --group=<name|number>
                         become these once all is set up; sockets and pidfile are theirs
  --sandbox=on|off       give up every privilege, system call and file that serving
                         does not need, once all is set up (on)
  --allow-path=<path>    except this file, or all below this directory; repeatable

Upgrade in place, of a process started with --control=/run/vm/disk0.ctl:
  vhost-user-blk --take-over=/run/vm/disk0.ctl

SIGTERM, SIGINT and SIGHUP end the program: requests in flight are finished,
everything is flushed, sockets and pidfile are removed, and the exit code is 0.
SIGUSR1 offers raw images and devices that have become longer to their guests; while
a guest runs that is noticed within a second, too.
"#;
