# Runs the static program in a guest: `doctor`, and `trace` during a connection of known size.
# xtask/src/report.rs reads the lines that start with `test`.
program=/tests/tcp-udp-trace
bytes=4242
port=7000

fail() {
    echo "test $1 ... FAILED"
    echo "test result: FAILED. 0 passed; 1 failed; 0 ignored;"
    cat errors
    exit 101
}

$program doctor 2>errors || fail doctor
echo "test doctor ... ok"

$program trace --json --filter "port=$port" >events 2>errors &
tracer=$!
until grep -q ^ready: errors; do
    kill -0 $tracer || fail trace
    sleep 0.1
done
# Sends back all that it receives.
busybox nc -l -p $port -e cat &
server=$!
until ss -Hltn "sport = $port" | grep -q $port; do sleep 0.1; done
head -c $bytes /dev/zero | busybox nc 127.0.0.1 $port >/dev/null
echo "the client has ended"
wait $server
echo "the server has ended"
kill $tracer
wait $tracer || fail trace
closes=$(grep '"to":"CLOSE"' events | grep -c "\"tx_bytes\":$bytes,\"rx_bytes\":$bytes,")
[ "$closes" = 2 ] || { cat events; fail trace; }
echo "test trace ... ok"
echo "test result: ok. 2 passed; 0 failed; 0 ignored;"
