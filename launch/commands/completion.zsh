# Completes KEY=VALUE and groups. It precedes shtab's script; launch/commands/completion.py puts the lists before it.

# The folders of config files besides the shipped one: from --config-dir, else from NGPT_CONFIG_DIR.
_ngpt_folders() {
  local i
  local -a found
  for ((i = 1; i < $#words; i++)); do
    case $words[i] in
      --config-dir) found+=("${~words[i + 1]}") ;;
      --config-dir=*) found+=("${~words[i]#--config-dir=}") ;;
    esac
  done
  (($#found)) || found=("${(@s.:.)NGPT_CONFIG_DIR}")
  print -rl -- ${found:#}
}

_ngpt_words() {
  local key folder file
  local -a found lines
  if [[ $PREFIX != *=* ]]; then
    _describe -t keys key _ngpt_keys -S = -q || _files # `ngpt data inspect` takes either
    return
  fi
  key=${PREFIX%%=*}
  compset -P '*='
  found=(${(f)_ngpt_values[$key]})
  for folder in ${(f)"$(_ngpt_folders)"}; do
    for file in $folder/$key/*.yaml(N); do
      lines=("${(@f)$(head -n 2 -- $file)}")
      [[ $lines[1] == '# @package'* ]] && shift lines
      found+=("${file:t:r}:${${(M)lines[1]:#\#*}#\# }")
    done
  done
  if (($#found)); then
    _describe -t values value found
  else
    _files
  fi
}

_ngpt_groups() {
  _describe -t groups group _ngpt_group_names
}
