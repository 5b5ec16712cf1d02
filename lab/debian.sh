# A server at rest: nginx, PostgreSQL with some data, and nothing that starts by itself when the guest has come up.
rm -f /etc/hostname /etc/resolv.conf
echo '/dev/vda / ext4 errors=remount-ro 0 1' >/etc/fstab
passwd -q -d root # for the console; ssh lets nobody in without a password
systemctl -q disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer logrotate.timer

# Port 80 is the lab's own.
sed -i 's/listen 80 /listen 8080 /; s/listen \[::\]:80 /listen [::]:8080 /' /etc/nginx/sites-available/default

# The guests' networks are the lab's: whoever reaches them may use the database. While it is filled here, on the host, it
# listens nowhere.
cat >/etc/postgresql/15/main/conf.d/lab.conf <<EOF
listen_addresses = '*'
EOF
cat >>/etc/postgresql/15/main/pg_hba.conf <<EOF
host all all 0.0.0.0/0 trust
host all all ::/0 trust
EOF
echo "I: filling the database..."
as_postgres() { runuser -u postgres -- "$@"; }
as_postgres pg_ctlcluster 15 main start -o "-c listen_addresses= -c fsync=off -c min_wal_size=32MB -c max_wal_size=32MB"
trap 'as_postgres pg_ctlcluster 15 main stop -m fast' EXIT
as_postgres createdb bench
as_postgres /usr/lib/postgresql/15/bin/pgbench -i -q -s 4 bench >/dev/null 2>&1
as_postgres psql -q -c CHECKPOINT
