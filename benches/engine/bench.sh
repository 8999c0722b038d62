#!/bin/sh
# Every row of the engine bench; the same script runs in a chroot of the host and in each guest. BATCH_MS, REPEATS and ROWS may be
# set: the length of a batch, how often whole programs run, and the only rows to run.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
here=/bench
cd /tmp || exit 1
wanted() { [ -z "$ROWS" ] && return 0; case " $ROWS " in *" $1 "*) return 0 ;; esac; return 1; }
small() {
    list=""
    for row in "$@"; do wanted "$row" && list="$list $row"; done
    # A fresh process a group: what a fork costs depends on what is mapped.
    [ -n "$list" ] && $here/rows --batch-ms "${BATCH_MS:-150}" $list
}
program() {
    row="$1"; shift
    wanted "$row" && $here/rows time "${REPEATS:-3}" "$row" "$@"
}
small intloop coremix sha256 fib indirect
small dmatmul sse_saxpy sse_int avx2_saxpy x87
small chase16k chase1m chase64m bytesum memcpy64k memcpy32m
small getpid read1 stat pipe yield fork forkexec forkexecdyn mmap1 fault256 file
program gzip gzip -6 -c $here/text1m.bin
program zstd3 zstd -3 -q -T1 -c $here/text.bin
program gcc_O2 gcc -O2 -S -o - $here/unit.c
program python python3 $here/script.py
program sh_loop sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $i'
for kind in sha256 aes-128-gcm; do
    wanted "openssl_$kind" && openssl speed -mr -seconds 1 -bytes 8192 -evp $kind 2>/dev/null | sed -n "s/^+F:/OPENSSL openssl_$kind /p"
done
wanted openssl_rsa2048 && openssl speed -mr -seconds 2 rsa2048 2>/dev/null | sed -n 's/^+F2:/OPENSSL openssl_rsa2048 /p'
echo BENCH END
